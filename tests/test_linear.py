"""`fp8_linear` against float64 on the same quantised operands: every recipe, dtype and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fp8dispatch
from fp8dispatch import (
    BackendUnavailableError,
    QuantizedActivation,
    ShapeError,
    fp8_linear,
    fp8_linear_quantized,
)
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, SCALE_DTYPES, activation_float8
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.oracle import RECIPES, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Ragged against every block size above, and not a multiple of 16.
N, K = 200, 300

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
every_backend = pytest.mark.parametrize(
    "backend", ["eager", "triton", pytest.param("cublaslt", marks=pytest.mark.gpu)]
)
# Triton's interpreter computes with numpy, which warns where IEEE arithmetic gives a NaN.
ignores_numpy = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    recipe: Recipe,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Run the call and compare everything about the output."""
    static = options.get("activation_scale")
    out = fp8_linear(x, weight, scale, bias, block_size=recipe.block_size, **options)

    assert out.shape == (*x.shape[:-1], weight.shape[0])
    assert out.dtype == (options.get("out_dtype") or x.dtype)
    assert out.is_contiguous()
    expected = oracle.linear_truth(x, weight, scale, recipe, bias, static)
    few = min(weight.shape) < 16  # see oracle.assert_matches
    oracle.assert_matches(out, expected, label=str(recipe), min_sqnr=-1e9 if few else None)
    return out


def run_or_skip(call: Callable[[], torch.Tensor], backend: str) -> torch.Tensor:
    """What a backend gives. Only cuBLASLt refuses calls; the others take everything."""
    try:
        return call()
    except BackendUnavailableError as refusal:
        if backend != "cublaslt":
            raise
        pytest.skip(str(refusal))


@every_recipe
@pytest.mark.parametrize("x_dtype", ACTIVATION_DTYPES, ids=name_of)
def test_every_recipe_and_input_dtype(recipe: Recipe, x_dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)

    check(torch.randn(37, K, device=device).to(x_dtype), weight, scale, recipe)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("weight_dtype", FLOAT8_DTYPES, ids=name_of)
def test_every_weight_and_scale_dtype(
    weight_dtype: torch.dtype, scale_dtype: torch.dtype, device: str
) -> None:
    x = torch.randn(5, K, device=device)
    for recipe in RECIPES.values():
        weight, scale = oracle.make_weight(
            N, K, recipe, dtype=weight_dtype, scale_dtype=scale_dtype, device=device
        )

        check(x, weight, scale, recipe)


@pytest.mark.parametrize("bias_dtype", [None, *ACTIVATION_DTYPES], ids=name_of)
@pytest.mark.parametrize("out_dtype", ACTIVATION_DTYPES, ids=name_of)
def test_every_output_and_bias_dtype(
    out_dtype: torch.dtype, bias_dtype: torch.dtype | None, device: str
) -> None:
    bias = None if bias_dtype is None else torch.randn(N, device=device).to(bias_dtype)
    for recipe in RECIPES.values():
        weight, scale = oracle.make_weight(N, K, recipe, device=device)
        for x_dtype in ACTIVATION_DTYPES:
            x = torch.randn(5, K, device=device).to(x_dtype)

            check(x, weight, scale, recipe, bias, out_dtype=out_dtype)


@every_recipe
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
def test_static_activation_scale(recipe: Recipe, scale_dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    # 2 ** -8 and its exponent; values above 1.75 are clamped.
    static = torch.full((1,), 2.0**-8, device=device)
    static = (
        torch.full((1,), 119, dtype=torch.uint8, device=device)
        if scale_dtype == torch.uint8
        else static.to(scale_dtype)
    )
    x = torch.randn(9, K, device=device)
    assert x.max() > 1.75

    out = check(x, weight, scale, recipe, activation_scale=static)

    clamped = check(x.clamp(-1.75, 1.75), weight, scale, recipe, activation_scale=static[0])
    assert torch.equal(out, clamped)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (7,), (2, 3), (2, 0, 3), (1, 2, 1, 4)])
def test_leading_shapes(leading: tuple[int, ...], device: str) -> None:
    bias = torch.randn(N, device=device)
    for recipe in RECIPES.values():
        weight, scale = oracle.make_weight(N, K, recipe, device=device)
        x = torch.randn(*leading, K, device=device)
        if x.numel():
            check(x, weight, scale, recipe, bias)
            continue

        out = fp8_linear(x, weight, scale, bias, block_size=recipe.block_size)

        assert out.shape == (*leading, N)
        assert out.dtype == x.dtype


@pytest.mark.parametrize("n", [1, 7, 16, 129, 256])
@pytest.mark.parametrize("k", [1, 31, 33, 128, 257])
def test_ragged_sizes(n: int, k: int, device: str) -> None:
    x = torch.randn(3, k, device=device)
    for recipe in RECIPES.values():
        weight, scale = oracle.make_weight(n, k, recipe, device=device)

        check(x, weight, scale, recipe, torch.randn(n, device=device))


@every_recipe
def test_strides_of_x(recipe: Recipe, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    base = torch.randn(K, 2 * 6 + 1, device=device, dtype=torch.bfloat16)
    stepped = torch.randn(6, 3 * K, device=device, dtype=torch.bfloat16)
    views = {
        "transposed": base.t(),
        "transposed and sliced": base.t()[1::2],
        "sliced": stepped[1:5, 7 : 7 + K],
        "every third column": stepped[:, ::3],
        "expanded": stepped[:1, :K].expand(4, K),
        "one value": stepped[:1, :1].expand(4, K),
        "permuted": torch.randn(3, K, 2, device=device, dtype=torch.bfloat16).permute(2, 0, 1),
    }
    for name, x in views.items():
        assert not x.is_contiguous(), name

        out = check(x, weight, scale, recipe)

        dense = fp8_linear(x.contiguous(), weight, scale, block_size=recipe.block_size)
        assert torch.equal(out, dense), name


class CopyFinder(TorchDispatchMode):
    """Fails when an operator gives the bytes of the whole weight in other memory."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.element_size() == 1:
                own = tensor.untyped_storage().data_ptr()
                copied = own != self.weight.untyped_storage().data_ptr()
                assert not (copied and tensor.numel() >= self.weight.numel()), f"{func} copies it"
        return out


@every_recipe
@every_backend
def test_transposed_views_give_the_same_bits_and_copy_nothing(
    recipe: Recipe, backend: str, device: str
) -> None:
    n, k = 48, 160  # no recipe has a square grid here, which would be ambiguous
    weight, scale = oracle.make_weight(n, k, recipe, device=device)
    x = torch.randn(2, k, device=device)
    flipped = weight.t().contiguous()  # [K, N], as some checkpoints hold it
    column_major = flipped.t()  # [N, K] over the same memory
    bare = [scale.t()] if recipe.block_size is not None else [scale.reshape(-1), scale]

    def call(matrix: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, matrix, grid, block_size=recipe.block_size, backend=backend)

    for straight, matrix in ((weight, weight.t()), (column_major, flipped)):
        plain = run_or_skip(lambda straight=straight: call(straight, scale), backend)
        for grid in bare:
            with CopyFinder(matrix):
                out = call(matrix, grid)

            assert torch.equal(out, plain)


def test_a_square_weight_is_read_as_n_by_k(device: str) -> None:
    weight, scale = oracle.make_weight(K, K, RECIPES["row"], device=device)
    x = torch.randn(4, K, device=device)

    check(x, weight.t(), scale, RECIPES["row"])


@every_recipe
@pytest.mark.parametrize("x_dtype", ACTIVATION_DTYPES, ids=name_of)
def test_meta_tensors_in_meta_out(recipe: Recipe, x_dtype: torch.dtype) -> None:
    weight = torch.empty(N, K, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(recipe.scale_shape(N, K), device="meta")
    bias = torch.empty(N, device="meta", requires_grad=True)
    x = torch.empty(2, 5, K, dtype=x_dtype, device="meta", requires_grad=True)

    out = fp8_linear(x, weight, scale, bias, block_size=recipe.block_size)
    out.sum().backward()

    assert out.is_meta
    assert out.shape == (2, 5, N)
    assert out.dtype == x_dtype
    assert (x.grad.shape, x.grad.dtype, x.grad.device.type) == (x.shape, x_dtype, "meta")
    assert (bias.grad.shape, bias.grad.device.type) == (bias.shape, "meta")
    with pytest.raises(ShapeError, match="K=299"):
        fp8_linear(x[..., 1:], weight, scale, block_size=recipe.block_size)


@ignores_numpy
@every_recipe
@every_backend
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_row_that_is_not_finite_stays_alone(
    recipe: Recipe, backend: str, static: bool, device: str
) -> None:
    n, k = 48, 160
    weight, scale = oracle.make_weight(n, k, recipe, device=device)
    activation_scale = torch.full((1,), 0.01, device=device) if static else None
    clean = torch.randn(6, k, device=device)
    dirty = clean.clone()
    dirty[1, 3], dirty[3, 100], dirty[4, k - 1] = torch.nan, torch.inf, -torch.inf

    def call(x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(
            x.bfloat16(),
            weight,
            scale,
            block_size=recipe.block_size,
            activation_scale=activation_scale,
            backend=backend,
        )

    right, out = run_or_skip(lambda: call(clean), backend), call(dirty)

    assert torch.equal(out[[0, 2, 5]], right[[0, 2, 5]])
    assert not torch.isfinite(out[[1, 3, 4]]).any()


@every_recipe
def test_zero_rows_and_zero_blocks_give_zeros(recipe: Recipe, device: str) -> None:
    values = torch.randn(N, K, device=device)
    values[:128, :128] = 0
    x = torch.randn(4, K, device=device)
    x[1] = 0
    x[2, :128] = 0
    weight, scale = fp8dispatch.quantize(values, recipe)

    out = check(x, weight, scale, recipe)

    assert not out[1].any()
    assert not fp8_linear(x, weight, torch.zeros_like(scale), block_size=recipe.block_size).any()


@pytest.mark.parametrize("x_dtype", ACTIVATION_DTYPES, ids=name_of)
def test_autocast_decides_the_output_dtype(x_dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, RECIPES["block-128x128"], device=device)
    bias = torch.randn(N, device=device, requires_grad=True)
    x = torch.randn(5, K, device=device).to(x_dtype).requires_grad_()
    plain = fp8_linear(x, weight, scale, bias, out_dtype=torch.bfloat16)

    with torch.autocast(device, dtype=torch.bfloat16):
        out = fp8_linear(x, weight, scale, bias)
        wide = fp8_linear(x, weight, scale, bias, out_dtype=torch.float32)
    out.sum().backward()

    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain)
    assert wide.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == x_dtype
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


@every_recipe
def test_inference_mode(recipe: Recipe, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    plain = fp8_linear(x, weight, scale, block_size=recipe.block_size)

    with torch.inference_mode():
        out = fp8_linear(x, weight, scale, block_size=recipe.block_size)
        # Tensors without a version counter, as a model loaded in inference mode holds them.
        unversioned = fp8_linear(x, weight.clone(), scale.clone(), block_size=recipe.block_size)

    assert out.is_inference()
    assert torch.equal(out, plain)
    assert torch.equal(unversioned, plain)


@every_recipe
@every_backend
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("weight_dtype", FLOAT8_DTYPES[::2], ids=name_of)
def test_quantised_activations_give_the_same_bits(
    recipe: Recipe, backend: str, static: bool, weight_dtype: torch.dtype, device: str
) -> None:
    n, k = 48, 160
    weight, scale = oracle.make_weight(n, k, recipe, dtype=weight_dtype, device=device)
    x = torch.randn(2, 3, k, device=device, dtype=torch.bfloat16)
    bias = torch.randn(n, device=device)
    activation_scale = torch.full((1,), 0.01, device=device) if static else None
    quantized = QuantizedActivation.from_tensor(
        x,
        group_size=None if static else recipe.group_size(k),
        scale=activation_scale,
        dtype=activation_float8(weight_dtype),
    )
    options = {"block_size": recipe.block_size, "backend": backend}

    plain = run_or_skip(
        lambda: fp8_linear(x, weight, scale, bias, activation_scale=activation_scale, **options),
        backend,
    )
    out = fp8_linear_quantized(quantized, weight, scale, bias, **options)

    assert out.shape == (2, 3, n)
    assert torch.equal(out, plain)
    truth = oracle.linear_truth(x, weight, scale, recipe, bias, activation_scale)
    oracle.assert_matches(out, truth, label=backend)


def test_one_quantisation_serves_two_weights(device: str) -> None:
    x = torch.randn(2, 5, K, device=device, dtype=torch.bfloat16)
    shared = QuantizedActivation.from_tensor(x, group_size=128)
    before = shared.data.view(torch.uint8).clone(), shared.scale.clone()
    # A scale laid out row by row, or under the leading shape, means the same.
    copies = [
        shared,
        QuantizedActivation(shared.data, shared.scale.contiguous()),
        QuantizedActivation(shared.data, shared.scale.reshape(2, 5, -1)),
    ]
    for n in (N, 64):
        weight, scale = oracle.make_weight(n, K, RECIPES["block-128x128"], device=device)
        for quantized in copies:
            out = fp8_linear_quantized(quantized, weight, scale, out_dtype=torch.float32)

            truth = oracle.linear_truth(x, weight, scale, RECIPES["block-128x128"])
            oracle.assert_matches(out, truth)
    assert torch.equal(shared.data.view(torch.uint8), before[0])
    assert torch.equal(shared.scale, before[1])


@pytest.fixture(params=["medium", "high"])
def reduced_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@every_recipe
def test_float32_matmul_precision_changes_nothing(
    recipe: Recipe, reduced_precision: str, device: str
) -> None:
    weight, scale = oracle.make_weight(256, 512, recipe, device=device)
    x = torch.randn(64, 512, device=device)
    quantized = oracle.dequantized_activations(x, recipe)
    truth = oracle.truth(quantized, oracle.dequantized_weight(weight, scale, recipe))

    out = fp8_linear(x, weight, scale, block_size=recipe.block_size, backend="eager")

    assert torch.get_float32_matmul_precision() == reduced_precision
    # TF32 and bf16 hold FP8 codes exactly, so only fp32 sums are left: far under any class.
    assert ((out.double() - truth.value).abs() / truth.mass).max() < 2.0**-16
