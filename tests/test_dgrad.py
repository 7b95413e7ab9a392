"""dX as an FP8 GEMM: right numbers, in every recipe that has one, and only where it is stated."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import fp8dispatch
from fp8dispatch import (
    fp8_linear,
    prepare,
    use_backend,
)
from fp8dispatch.backends.contract import Weight
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, SCALE_DTYPES
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import ROW, TENSOR, Recipe
from tests import fp8_gradients, oracle
from tests.fp8_gradients import BLOCK, K, N, every_recipe, gradient, layer
from tests.oracle import name_of

Products = list[tuple[LinearProblem, Weight]]
both_backends = pytest.mark.parametrize("backend", ["eager", "triton"])


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    return fp8_gradients.watch(monkeypatch)


@every_recipe
@pytest.mark.parametrize("out_dtype", ACTIVATION_DTYPES, ids=name_of)
@pytest.mark.parametrize("x_dtype", ACTIVATION_DTYPES, ids=name_of)
def test_numbers(recipe: Recipe, x_dtype: torch.dtype, out_dtype: torch.dtype, device: str) -> None:
    weight, scale = layer(recipe, device)
    x = torch.randn(2, 7, K, device=device).to(x_dtype).requires_grad_()
    grad = torch.randn(2, 7, N, device=device).to(out_dtype)

    got = gradient(x, grad, weight, scale, recipe, out_dtype=out_dtype)

    assert (got.shape, got.dtype) == (x.shape, x_dtype)
    oracle.assert_matches(got, fp8_gradients.truth(grad, weight, scale, recipe))


@every_recipe
@both_backends
def test_every_layout_of_the_weight_and_of_its_gradient(
    recipe: Recipe, backend: str, device: str
) -> None:
    weight, scale = layer(recipe, device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grads = {
        "rows apart": torch.randn(10, N, device=device)[::2],
        "transposed": torch.randn(N, 5, device=device).t(),
        "one row for all": torch.randn(1, N, device=device).expand(5, N),
        "one number for all": torch.ones(1, 1, device=device).expand(5, N),
    }
    if backend == "triton":  # slow in its interpreter
        grads = {"transposed": grads["transposed"]}
    flipped = scale if recipe.block_size is None else scale.t()
    wide = torch.zeros(N, K + 20, device=device).to(weight.dtype)
    wide[:, :K] = weight
    for name, grad in grads.items():
        expected = fp8_gradients.truth(grad, weight, scale, recipe)
        for matrix, grid in ((weight, scale), (weight.t(), flipped), (wide[:, :K], scale)):
            got = gradient(x, grad, matrix, grid, recipe, backend=backend)
            oracle.assert_matches(got, expected, label=f"{name}, {matrix.stride()}")


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=name_of)
@every_recipe
def test_every_scale(
    recipe: Recipe, weight_dtype: torch.dtype, scale_dtype: torch.dtype, device: str
) -> None:
    weight, scale = oracle.make_weight(
        N, K, recipe, dtype=weight_dtype, scale_dtype=scale_dtype, device=device
    )
    x = torch.randn(3, K, device=device, requires_grad=True)
    grad = torch.randn(3, N, device=device)

    got = gradient(x, grad, weight, scale, recipe)

    oracle.assert_matches(got, fp8_gradients.truth(grad, weight, scale, recipe))


@every_recipe
@pytest.mark.parametrize("weight_dtype", FLOAT8_DTYPES, ids=name_of)
def test_what_quantising_dy_costs(weight_dtype: torch.dtype, recipe: Recipe, device: str) -> None:
    """The figure of the module's docstring; and that something is quantised at all."""
    weight, scale = oracle.make_weight(N, K, recipe, dtype=weight_dtype, device=device)
    x = torch.randn(64, K, device=device, requires_grad=True)
    grad = torch.randn(64, N, device=device)

    got = gradient(x, grad, weight, scale, recipe)

    exact = grad.double() @ oracle.dequantized_weight(weight, scale, recipe)
    ratio = oracle.sqnr(got, exact)
    assert ratio.min() >= fp8_gradients.MIN_SQNR_UNQUANTIZED
    assert 30.5 <= ratio.mean() <= 33


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in the interpreter
@every_recipe
@both_backends
def test_a_row_that_is_not_finite_spoils_no_other(
    recipe: Recipe, backend: str, device: str
) -> None:
    weight, scale = layer(recipe, device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device)
    good = grad[[0, 2, 4]]
    grad[1], grad[3, 7], grad[2] = 0, torch.nan, 0
    grad[4, 5] = torch.inf

    got = gradient(x, grad, weight, scale, recipe, backend=backend)

    expected = fp8_gradients.truth(good[:1], weight, scale, recipe)
    oracle.assert_matches(got[:1], expected)
    assert torch.equal(got[1:3], torch.zeros_like(got[1:3]))
    group = recipe.block_size[0] if recipe.block_size is not None else N
    assert not got[3].isfinite().any() if group == N else not got[3].isfinite().all()
    assert not got[4].isfinite().all()


def test_no_row_and_no_weight(device: str) -> None:
    weight, scale = layer(ROW, device)
    x = torch.randn(0, K, device=device, requires_grad=True)
    assert gradient(x, torch.randn(0, N), weight, scale, ROW).shape == (0, K)
    zeros, ones = torch.zeros_like(weight), torch.zeros_like(scale)
    x = torch.randn(3, K, device=device, requires_grad=True)
    got = gradient(x, torch.randn(3, N, device=device), zeros, ones, ROW)
    assert torch.equal(got, torch.zeros_like(got))


def test_the_largest_gradients_of_rows_stay_finite(device: str) -> None:
    """A row's scale is multiplied into dY; as a share of the largest it cannot overflow."""
    weight = torch.full((N, K), 2.0**-9, device=device).to(torch.float8_e4m3fn)
    scale = torch.linspace(1, 1e5, N, device=device)[:, None]
    x = torch.zeros(3, K, device=device, requires_grad=True)
    grad = torch.zeros(3, N, device=device)
    grad[:, -4:] = 1e34  # 1e39 with the scale, and 8e36 with the weight

    got = gradient(x, grad, weight, scale, ROW)

    oracle.assert_matches(got, fp8_gradients.truth(grad, weight, scale, ROW))


@every_recipe
def test_small_gradients_keep_their_bits_until_the_smallest_scale(
    recipe: Recipe, device: str
) -> None:
    weight, scale = layer(recipe, device)
    x = torch.randn(16, K, device=device, requires_grad=True)
    grad = torch.randn(16, N, device=device)
    exact = grad.double() @ oracle.dequantized_weight(weight, scale, recipe)

    for size in (1e-6, 1e-14):
        got = gradient(x, grad * size, weight, scale, recipe)
        assert oracle.sqnr(got.double() / size, exact).min() >= 27
    assert not gradient(x, grad * 1e-20, weight, scale, recipe).any()


def test_the_bias_has_the_gradient_that_it_always_has(device: str) -> None:
    weight, scale = layer(device=device)
    bias = torch.randn(N, device=device, requires_grad=True)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device)

    def grads(way: str) -> tuple[torch.Tensor, ...]:
        with use_backend(dgrad=way):
            return torch.autograd.grad(fp8_linear(x, weight, scale, bias), (x, bias), grad)

    usual, fp8 = grads("dequantized"), grads("fp8")

    assert torch.equal(usual[1], fp8[1])
    assert not torch.equal(usual[0], fp8[0])
    oracle.assert_gradient(usual[0], grad, oracle.dequantized_weight(weight, scale, BLOCK))


def transposed_bytes(weight: torch.Tensor) -> int:
    return prepare.prepared_bytes(weight)


@every_recipe
def test_the_transposed_weight_is_made_once_and_goes_with_it(
    recipe: Recipe, device: str, products: Products
) -> None:
    weight, scale = layer(recipe, device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device)

    def backward(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        products.clear()
        got = gradient(x, grad, weight, scale, recipe, backend="triton")
        operand: torch.Tensor = products[-1][1].data
        assert operand.is_contiguous()
        assert operand.shape == (K, N)
        oracle.assert_matches(got, fp8_gradients.truth(grad, weight, scale, recipe))
        return operand

    before = len(prepare._entries)
    first = backward(weight, scale)
    assert transposed_bytes(weight) == N * K
    assert backward(weight, scale).data_ptr() == first.data_ptr()
    weight.copy_(weight.flip(0))  # a change that torch counts
    second = backward(weight, scale)
    assert torch.equal(second.view(torch.uint8), weight.view(torch.uint8).t())
    scale.mul_(1.5)
    backward(weight, scale)
    del first, second, weight, scale
    products.clear()
    gc.collect()
    assert len(prepare._entries) <= before


@pytest.mark.parametrize("shape", [(1, K), (N, 1), (1, 1)], ids=str)
def test_a_weight_of_one_row_or_column_is_not_kept_alive(
    shape: tuple[int, int], device: str
) -> None:
    """Its transposed view is contiguous in a way, and must be copied all the same."""
    weight, scale = oracle.make_weight(*shape, TENSOR, device=device)
    x = torch.randn(3, shape[1], device=device, requires_grad=True)
    gradient(x, torch.randn(3, shape[0]), weight, scale, TENSOR, backend="triton")
    alive = weakref.ref(weight.untyped_storage())
    del weight
    gc.collect()
    assert alive() is None


def test_no_copy_where_none_is_needed(device: str, products: Products) -> None:
    weight, scale = layer(device=device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    gradient(x, torch.randn(5, N), weight, scale, BLOCK, backend="eager")
    assert products[-1][1].data.data_ptr() == weight.data_ptr()
    # Passed as [K, N], it lies as the product needs it.
    turned = weight.t().contiguous()
    gradient(x, torch.randn(5, N), turned, scale.t(), BLOCK, backend="triton")
    assert products[-1][1].data.data_ptr() == turned.data_ptr()
    assert transposed_bytes(weight) == transposed_bytes(turned) == 0


def test_warming_up_makes_it_and_counts_it(device: str) -> None:
    fp8 = fp8dispatch.FP8Linear.from_linear(torch.nn.Linear(K, N), "row", backend="triton").to(
        device
    )
    (usual,) = fp8dispatch.warmup(fp8, [3])
    with use_backend(dgrad="fp8"):
        (trained,) = fp8dispatch.warmup(fp8, [3])
    assert trained.extra_bytes - usual.extra_bytes >= N * K
    assert fp8.bias.grad is None


@every_recipe
def test_backends_keep_the_layouts_of_both_products_apart(
    recipe: Recipe, device: str, products: Products
) -> None:
    """They remember them with the scale's memory; a square weight would find the other's."""
    weight, scale = oracle.make_weight(K, K, recipe, device=device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    gradient(x, torch.randn(5, K), weight, scale, recipe, backend="eager")
    (_, forward), (_, backward) = products
    ours = {one.scale_source.untyped_storage().data_ptr() for one in (forward, backward)}
    assert len(ours) == 2
