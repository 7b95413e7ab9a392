"""`rms_norm_quantize` and `silu_mul_quantize`: what they return, refuse and give to a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8dispatch import (
    DeviceError,
    DTypeError,
    InvalidInputError,
    QuantizedActivation,
    ShapeError,
    UnsupportedTransformError,
    fp8_linear,
    fp8_linear_quantized,
    rms_norm_quantize,
    silu_mul_quantize,
)
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.oracle import RECIPES, name_of

EPS = 1e-6
K, N = 96, 48
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
inputs = pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=name_of)


def group_of(recipe: Recipe) -> int | None:
    return None if recipe.block_size is None else recipe.block_size[1]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch's own, in fp32."""
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), EPS)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.float() / (1 + (-gate.float()).exp()) * up.float()


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Two outputs of a linear over activations that may differ in a few FP8 codes."""
    assert got.shape == wanted.shape
    assert oracle.sqnr(got.flatten(0, -2), wanted.flatten(0, -2)).min() > 40


@inputs
@every_recipe
def test_a_linear_takes_the_result(recipe: Recipe, dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    x, other = (torch.randn(2, 5, K, device=device).to(dtype) for _ in range(2))
    gain = torch.randn(K, device=device).to(dtype)
    group, options = group_of(recipe), {"block_size": recipe.block_size}

    alone = rms_norm_quantize(x, gain, EPS, group_size=group)
    added, total = rms_norm_quantize(x, gain, EPS, residual=other, group_size=group)
    product = silu_mul_quantize(x, other, group_size=group)

    assert (total.dtype, total.shape) == (dtype, x.shape)
    assert torch.equal(total, x + other)
    for quantized, wide in (
        (alone, norm(x, gain)),
        (added, norm(x + other, gain)),
        (product, gated(x, other)),
    ):
        assert quantized.data.shape == x.shape
        wanted = QuantizedActivation.from_tensor(wide, group_size=group)
        torch.testing.assert_close(quantized.scale, wanted.scale, rtol=2e-5, atol=0)
        got = fp8_linear_quantized(quantized, weight, scale, out_dtype=torch.float32, **options)
        assert_close(got, fp8_linear(wide, weight, scale, **options))


def test_a_vector_and_no_rows(device: str) -> None:
    gain = torch.ones(K, device=device)

    vector = rms_norm_quantize(torch.randn(K, device=device), gain, EPS, group_size=32)
    none, total = rms_norm_quantize(
        torch.randn(2, 0, K, device=device), gain, EPS, residual=torch.randn(2, 0, K, device=device)
    )
    product = silu_mul_quantize(torch.randn(0, K, device=device), torch.randn(0, K, device=device))

    assert (vector.data.shape, vector.scale.shape) == ((K,), (1, 3))
    assert (none.data.shape, none.scale.shape, total.shape) == ((2, 0, K), (0, 1), (2, 0, K))
    assert (product.data.shape, product.scale.shape) == ((0, K), (0, 1))


def test_strided_inputs_of_any_leading_shape(device: str) -> None:
    gate_up = torch.randn(3, 4, 2 * K, device=device).bfloat16()
    gate, up = gate_up.chunk(2, -1)
    swapped = gate.transpose(0, 1)
    gain = torch.randn(2 * K, device=device)[::2]

    product = silu_mul_quantize(gate, up, group_size=32)
    normal, total = rms_norm_quantize(swapped, gain, EPS, residual=swapped, group_size=32)

    packed = silu_mul_quantize(gate.contiguous(), up.contiguous(), group_size=32)
    assert torch.equal(product.data.view(torch.uint8), packed.data.view(torch.uint8))
    assert torch.equal(product.scale, packed.scale)
    assert torch.equal(total, swapped + swapped)
    dense = swapped.contiguous()
    packed, _ = rms_norm_quantize(dense, gain.contiguous(), EPS, residual=dense, group_size=32)
    assert torch.equal(normal.data.view(torch.uint8), packed.data.view(torch.uint8))


def test_meta_tensors_give_meta_tensors() -> None:
    x, gain = torch.empty(2, 3, K, device="meta"), torch.empty(K, device="meta")

    quantized, total = rms_norm_quantize(x, gain, EPS, residual=x, group_size=32)
    product = silu_mul_quantize(x, x)

    assert (quantized.data.shape, quantized.scale.shape) == ((2, 3, K), (6, 3))
    assert (total.shape, total.device.type) == (x.shape, "meta")
    assert (product.data.dtype, product.scale.shape) == (torch.float8_e4m3fn, (6, 1))
    assert product.data.is_meta and product.scale.is_meta


X, GAIN = torch.zeros(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"x": [1.0]}, DTypeError, r"x must be a torch.Tensor, found list"),
        ({"x": X.int()}, DTypeError, r"x must be one of bfloat16, .* found int32"),
        ({"x": torch.zeros(3, 0)}, ShapeError, r"x must be \[..., K\]"),
        ({"weight": GAIN.int()}, DTypeError, r"weight must be one of .* found int32"),
        ({"weight": GAIN[:7]}, ShapeError, r"the norm's weight must be \[8\], .* found \[7\]"),
        ({"weight": GAIN.to("meta")}, DeviceError, r"x must be on the weight's device meta"),
        ({"eps": 0.0}, InvalidInputError, r"eps must be a positive number .* found 0.0"),
        ({"eps": float("nan")}, InvalidInputError, r"eps must be a positive number .* found nan"),
        ({"eps": "1e-6"}, DTypeError, r"eps must be a positive number .* found '1e-6'"),
        ({"residual": X[:2]}, ShapeError, r"residual must have the shape of x, \[3, 8\], found"),
        ({"residual": X.half()}, DTypeError, r"residual must have the dtype of x, float32, found"),
        ({"residual": X.to("meta")}, DeviceError, r"residual must be on the device of x, cpu"),
        ({"group_size": 0}, ShapeError, r"group_size must be a positive integer, found 0"),
        ({"group_size": 2.0}, DTypeError, r"group_size must be a positive integer, found 2.0"),
        ({"dtype": torch.int8}, DTypeError, r"dtype must be one of torch.float8_e4m3fn"),
    ],
)
def test_malformed_norms_are_refused(
    changed: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    arguments = {"x": X, "weight": GAIN, "eps": EPS} | changed

    with pytest.raises(error, match=sentence):
        rms_norm_quantize(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"gate": X.long()}, DTypeError, r"gate must be one of bfloat16, .* found int64"),
        ({"up": None}, DTypeError, r"up must be a torch.Tensor, found NoneType"),
        ({"up": X[:, :4]}, ShapeError, r"up must have the shape of gate, \[3, 8\], found \[3, 4\]"),
        ({"up": X.bfloat16()}, DTypeError, r"up must have the dtype of gate, float32, found"),
        ({"up": X.to("meta")}, DeviceError, r"up must be on the device of gate, cpu, found meta"),
        ({"group_size": -1}, ShapeError, r"group_size must be a positive integer, found -1"),
        ({"dtype": torch.half}, DTypeError, r"dtype must be one of torch.float8_e4m3fn"),
    ],
)
def test_malformed_products_are_refused(
    changed: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        silu_mul_quantize(**({"gate": X, "up": X} | changed))


def test_a_gradient_is_never_lost_silently() -> None:
    x, gain = X.clone().requires_grad_(), torch.nn.Parameter(GAIN.clone())

    for arguments in ((x, GAIN, EPS), (X, gain, EPS)):
        with pytest.raises(InvalidInputError, match="use rms_norm_linear for training"):
            rms_norm_quantize(*arguments)
    with pytest.raises(InvalidInputError, match="use rms_norm_linear for training"):
        rms_norm_quantize(X, GAIN, EPS, residual=x)
    with pytest.raises(InvalidInputError, match="use silu_mul_linear for training"):
        silu_mul_quantize(X, x)
    with torch.no_grad():
        assert not rms_norm_quantize(x, gain, EPS).data.requires_grad
        assert not silu_mul_quantize(x, x).data.requires_grad


def test_vmap_is_refused() -> None:
    with pytest.raises(UnsupportedTransformError, match="vmap"):
        torch.func.vmap(lambda x: rms_norm_quantize(x, GAIN, EPS).data)(X)
    with pytest.raises(UnsupportedTransformError, match="vmap"):
        torch.func.vmap(lambda x: silu_mul_quantize(x, x).data)(X)


def layout(tensor: torch.Tensor) -> list[int]:
    """Strides that mean anything: those of dimensions longer than one."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def run_both(x: torch.Tensor, other: torch.Tensor, gain: torch.Tensor) -> list[torch.Tensor]:
    alone = rms_norm_quantize(x, gain, EPS, group_size=32)
    added, total = rms_norm_quantize(x, gain, EPS, residual=other)
    product = silu_mul_quantize(x, other, group_size=32)
    return [alone.data, alone.scale, added.data, added.scale, total, product.data, product.scale]


def test_a_compiler_sees_one_operator_for_each() -> None:
    torch._dynamo.reset()
    x, other, gain = torch.randn(4, K), torch.randn(4, K), torch.randn(K)

    got = torch.compile(run_both, backend="aot_eager", fullgraph=True)(x, other, gain)

    for found, wanted in zip(got, run_both(x, other, gain), strict=True):
        assert layout(found) == layout(wanted)
        assert torch.equal(found.float(), wanted.float())
    torch._dynamo.reset()


def test_fake_tensors_have_the_layout_of_real_ones() -> None:
    real = run_both(torch.randn(2, 3, K), torch.randn(2, 3, K), torch.randn(K))
    with FakeTensorMode():
        fake = run_both(torch.randn(2, 3, K), torch.randn(2, 3, K), torch.randn(K))

    for found, wanted in zip(fake, real, strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert layout(found) == layout(wanted)


@pytest.mark.parametrize("op", ["rms_norm_quantize", "add_rms_norm_quantize", "silu_mul_quantize"])
def test_operators_keep_their_promises(op: str) -> None:
    x, gain = torch.randn(2, 3, K), torch.randn(K)
    tail = (32, torch.float8_e4m3fn)
    arguments = {
        "rms_norm_quantize": (x, gain, EPS, *tail),
        "add_rms_norm_quantize": (x, x.clone(), gain, EPS, *tail),
        "silu_mul_quantize": (x, x.clone(), *tail),
    }[op]

    torch.library.opcheck(getattr(torch.ops.fp8dispatch, op).default, arguments)
