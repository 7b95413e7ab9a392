"""The names of Unsloth and of the hub kernel: their shapes, and right where those were wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

import fp8dispatch
from fp8dispatch import (
    FbgemmFp8Linear_matmul,
    FP8BlockQuantLinear,
    FrozenWeightError,
    ShapeError,
    act_quant,
    fbgemm_fp8_linear,
    fp8_act_quant,
    fp8_block_quant_linear,
    fp8_linear,
    generation,
    w8a8_block_fp8_matmul,
    w8a8_block_fp8_matmul_triton,
    weight_dequant,
)
from fp8dispatch.recipe import Granularity, Recipe
from tests import oracle
from tests.oracle import RECIPES

Call = Callable[..., torch.Tensor]

BLOCK = RECIPES["block-128x128"]
SMALL = Recipe(Granularity.BLOCK, (64, 64))
# Ragged against blocks of 128 and of 64.
N, K = 200, 300

quantisers = pytest.mark.parametrize("quantise", [act_quant, fp8_act_quant])
matmuls = pytest.mark.parametrize("matmul", [w8a8_block_fp8_matmul, w8a8_block_fp8_matmul_triton])


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "act_quant": "x, block_size=128",
        "fp8_act_quant": "x, block_size=128",
        "weight_dequant": "x, s, dtype=torch.bfloat16, block_size=None",
        "w8a8_block_fp8_matmul_triton": "A, B, As, Bs, block_size, output_dtype=torch.float32",
        "w8a8_block_fp8_matmul": "A, B, As, Bs, block_size, output_dtype=torch.float32",
        "fp8_block_quant_linear": "X, weight, weight_scale",
        "fbgemm_fp8_linear": "X, weight, weight_scale, bias=None",
        "FP8BlockQuantLinear.apply": "X, weight, weight_scale",
        "FbgemmFp8Linear_matmul.apply": "x, weight, weight_scale, bias=None",
    }.items(),
)
def test_signatures(name: str, parameters: str) -> None:
    target = fp8dispatch
    for part in name.split("."):
        target = getattr(target, part)
    signature = inspect.signature(target)

    written = ", ".join(
        parameter.name
        if parameter.default is parameter.empty
        else f"{parameter.name}={parameter.default}"
        for parameter in signature.parameters.values()
    )
    assert written == parameters


def test_the_classes_are_autograd_functions() -> None:
    for function in (FP8BlockQuantLinear, FbgemmFp8Linear_matmul):
        assert issubclass(function, torch.autograd.Function)


@quantisers
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("block_size", [128, 64])
def test_activations_keep_their_leading_shape(
    quantise: Call, leading: tuple[int, ...], block_size: int, device: str
) -> None:
    x = torch.randn(*leading, K, device=device, dtype=torch.bfloat16)

    data, scale = quantise(x, block_size)

    groups = -(-K // block_size)
    assert (data.shape, data.dtype) == (x.shape, torch.float8_e4m3fn)
    assert (scale.shape, scale.dtype) == ((*leading, groups), torch.float32)
    spread = scale.double()[..., torch.arange(K, device=device) // block_size]
    padded = torch.nn.functional.pad(x.double().abs(), (0, groups * block_size - K))
    amax = padded.unflatten(-1, (groups, block_size)).amax(-1)
    assert torch.equal(scale, (amax / 448).float())
    # Half a step of a 3-bit mantissa, or half the smallest step, of what was divided.
    error = (data.double() * spread - x.double()).abs()
    assert bool((error <= torch.maximum(x.double().abs() / 16, spread * 2.0**-10) * 1.0001).all())


@quantisers
def test_an_activation_block_of_zeros_is_zeros(quantise: Call, device: str) -> None:
    x = torch.randn(3, 256, device=device)
    x[1, 128:] = 0

    data, scale = quantise(x)

    assert scale[1, 1] == 1
    assert not data[1, 128:].float().any()
    assert bool(data.float().isfinite().all())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weight_dequant(recipe: Recipe, dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)

    restored = weight_dequant(weight, scale, dtype, block_size=recipe.block_size)

    assert restored.dtype == dtype
    exact = oracle.dequantized_weight(weight, scale, recipe)
    assert torch.equal(restored, exact.float().to(dtype))
    if recipe == BLOCK:
        assert torch.equal(weight_dequant(weight, scale), exact.float().bfloat16())


def test_weight_dequant_never_guesses_a_block(device: str) -> None:
    weight, scale = oracle.make_weight(256, 256, SMALL, device=device)  # a scale of [4, 4]
    exact = oracle.dequantized_weight(weight, scale, SMALL).float()

    with pytest.raises(ShapeError, match="block_size"):
        weight_dequant(weight, scale)
    weight.block_size = [64, 64]  # type: ignore[attr-defined]
    assert torch.equal(weight_dequant(weight, scale, torch.float32), exact)


def test_weight_dequant_of_a_block_of_zeros(device: str) -> None:
    weight, scale = fp8dispatch.quantize(torch.zeros(N, K, device=device))

    for factor in (1, 0):  # some checkpoints store a zero scale with a zero block
        assert torch.equal(
            weight_dequant(weight, scale * factor, torch.float32),
            torch.zeros(N, K, device=device),
        )


@matmuls
@pytest.mark.parametrize("recipe", [BLOCK, SMALL, RECIPES["block-1x128"]], ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (1, 2)])
def test_matmul_of_quantised_operands(
    matmul: Call, recipe: Recipe, leading: tuple[int, ...], device: str
) -> None:
    n, k = 136, 200  # two blocks of rows and of columns
    weight, scale = oracle.make_weight(n, k, recipe, device=device)
    x = torch.randn(*leading, k, device=device, dtype=torch.bfloat16)
    assert recipe.block_size is not None
    data, x_scale = act_quant(x, recipe.block_size[1])
    truth = oracle.linear_truth(x, weight, scale, recipe)

    out = matmul(data, weight, x_scale, scale, list(recipe.block_size))
    narrow = matmul(data, weight, x_scale, scale, list(recipe.block_size), torch.bfloat16)

    assert (out.shape, out.dtype) == ((*leading, n), torch.float32)
    assert (narrow.shape, narrow.dtype) == ((*leading, n), torch.bfloat16)
    oracle.assert_matches(out, truth)
    oracle.assert_matches(narrow, truth)


@matmuls
def test_matmul_refuses_scales_of_another_block_size(matmul: Call, device: str) -> None:
    weight, scale = oracle.make_weight(40, 200, BLOCK, device=device)
    data, x_scale = act_quant(torch.randn(3, 200, device=device), 64)

    with pytest.raises(ShapeError, match="group_size=128"):
        matmul(data, weight, x_scale, scale, [128, 128])
    with pytest.raises(ShapeError, match="activation scales"):
        matmul(data, weight, act_quant(data.float())[1].flatten(), scale, [128, 128])
    with pytest.raises(ShapeError, match="weight_scale"):
        matmul(data, weight, x_scale, scale, [64, 64])


def test_the_triton_name_runs_on_triton(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8dispatch.backends import triton

    calls: list[int] = []

    def spy(self: triton.Triton, *args: object) -> torch.Tensor:
        calls.append(1)
        return run(self, *args)

    weight, scale = oracle.make_weight(16, 128, BLOCK, device=device)
    data, x_scale = act_quant(torch.randn(1, 128, device=device))
    w8a8_block_fp8_matmul_triton(data, weight, x_scale, scale, [128, 128])  # its canary
    run = triton.Triton.matmul
    monkeypatch.setattr(triton.Triton, "matmul", spy)
    generation.renew()  # a plan of an earlier call of this shape holds the method itself

    w8a8_block_fp8_matmul_triton(data, weight, x_scale, scale, [128, 128])

    assert calls == [1]


LINEARS = {
    "fp8_linear": fp8_linear,
    "fbgemm_fp8_linear": fbgemm_fp8_linear,
    "FbgemmFp8Linear_matmul": FbgemmFp8Linear_matmul.apply,
}
BLOCK_LINEARS = {
    "fp8_block_quant_linear": fp8_block_quant_linear,
    "FP8BlockQuantLinear": FP8BlockQuantLinear.apply,
}


@pytest.mark.parametrize("linear", LINEARS.values(), ids=LINEARS.keys())
@pytest.mark.parametrize("recipe", ["row", "tensor", "block-128x128"])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_linears_with_a_bias(linear: Call, recipe: str, x_dtype: torch.dtype, device: str) -> None:
    meaning = RECIPES[recipe]
    weight, scale = oracle.make_weight(N, K, meaning, device=device)
    bias = (10 * torch.randn(N, device=device)).requires_grad_()
    x = torch.randn(2, 3, K, device=device).to(x_dtype).requires_grad_()
    grad = torch.randn(2, 3, N, device=device).to(x_dtype)

    out = linear(x, weight, scale, bias)
    got, got_bias = torch.autograd.grad(out, (x, bias), grad)

    assert (out.shape, out.dtype) == ((2, 3, N), x_dtype)
    oracle.assert_matches(out, oracle.linear_truth(x, weight, scale, meaning, bias))
    oracle.assert_gradient(got, grad, oracle.dequantized_weight(weight, scale, meaning))
    oracle.assert_bias_gradient(got_bias, grad, bias)
    without = linear(x, weight, scale)
    oracle.assert_matches(without, oracle.linear_truth(x, weight, scale, meaning))


@pytest.mark.parametrize("linear", BLOCK_LINEARS.values(), ids=BLOCK_LINEARS.keys())
@pytest.mark.parametrize("recipe", [BLOCK, SMALL, RECIPES["block-48x80"]], ids=str)
@pytest.mark.parametrize("holder", ["weight", "scale"])
def test_block_linears_use_the_block_size_of_the_weight_in_both_directions(
    linear: Call, recipe: Recipe, holder: str, device: str
) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    target = weight if holder == "weight" else scale
    assert recipe.block_size is not None
    target.block_size = list(recipe.block_size)  # type: ignore[attr-defined]
    x = torch.randn(2, 3, K, device=device, requires_grad=True)
    grad = torch.randn(2, 3, N, device=device)

    out = linear(x, weight, scale)
    (got,) = torch.autograd.grad(out, x, grad)

    oracle.assert_matches(out, oracle.linear_truth(x, weight, scale, recipe))
    oracle.assert_gradient(got, grad, oracle.dequantized_weight(weight, scale, recipe))


@pytest.mark.parametrize(
    "linear", [*LINEARS.values(), *BLOCK_LINEARS.values()], ids=[*LINEARS, *BLOCK_LINEARS]
)
def test_blocks_of_zeros_give_zeros_in_both_directions(linear: Call, device: str) -> None:
    values = torch.randn(256, 256, device=device)
    values[:128] = 0
    weight, scale = fp8dispatch.quantize(values)
    x = torch.randn(4, 256, device=device)
    x[1, :128] = 0
    x[2] = 0
    x.requires_grad_()

    out = linear(x, weight, scale)
    (got,) = torch.autograd.grad(out[:, :128].sum(), x)

    assert not out[:, :128].any()
    assert not out[2].any()
    assert bool(out.isfinite().all())
    assert not got.any()


@pytest.mark.parametrize(
    "linear", [*LINEARS.values(), *BLOCK_LINEARS.values()], ids=[*LINEARS, *BLOCK_LINEARS]
)
def test_the_weight_is_frozen(linear: Call, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, BLOCK, device=device)

    out = linear(torch.randn(4, K, device=device), torch.nn.Parameter(weight), scale)

    with pytest.raises(FrozenWeightError):
        out.sum().backward()


@pytest.mark.parametrize("linear", BLOCK_LINEARS.values(), ids=BLOCK_LINEARS.keys())
def test_block_linears_take_row_scales_too(linear: Call, device: str) -> None:
    """A weight of K <= 128 has one column of block scales; the shapes must not confuse them."""
    weight, scale = oracle.make_weight(N, 100, BLOCK, device=device)
    rows, row_scale = oracle.make_weight(N, 100, RECIPES["row"], device=device)
    x = torch.randn(4, 100, device=device)

    assert scale.shape == (2, 1)
    oracle.assert_matches(linear(x, weight, scale), oracle.linear_truth(x, weight, scale, BLOCK))
    truth = oracle.linear_truth(x, rows, row_scale, RECIPES["row"])
    oracle.assert_matches(linear(x, rows, row_scale), truth)
