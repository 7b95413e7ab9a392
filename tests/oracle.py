"""The ground truth of every numeric test: float64 on the same quantised operands.

An error is judged twice: per element, against the sum of the absolute products plus |bias| (so
that a scrambled or zeroed row cannot hide behind large neighbours), and per row, as a
signal-to-noise ratio in decibels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fp8dispatch
from fp8dispatch.formats import activation_float8, decode_scale, dtype_name
from fp8dispatch.quantization import eager
from fp8dispatch.quantization.weight import block_of
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe

# Unit roundoff of the output dtypes, and the smallest step near zero.
_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_SUBNORMAL = {torch.bfloat16: 0.0, torch.float16: 2.0**-25, torch.float32: 0.0}

EXACT_ACCUMULATION = 2.0**-12
"""Error of fp32 promotion every 128 of K, relative to the sum of the absolute products.

Hopper's tensor core aligns the products of one FP8 instruction to the largest and keeps about 14
bits; chains of at most 128 products are then added in fp32, so the error stays that of a chain.
"""


def exact_accumulation(k: int) -> float:
    """The same for a sum of few products, of which the largest is a larger share.

    Where a third of a row is 50 times larger than the rest, Gluon, Triton and cuBLASLt all reach
    1.97 times `EXACT_ACCUMULATION` at K = 144, 1.75 at 256, 0.67 at 400 (an H200, 12 seeds).
    """
    return EXACT_ACCUMULATION * (4 if k <= 256 else 1)


FAST_ACCUMULATION = 2.0**-9
"""The same when the tensor core accumulates over all of K (up to 16384) by itself."""

MIN_SQNR = {torch.bfloat16: 50.0, torch.float16: 65.0, torch.float32: 65.0}
"""Decibels per row that exact accumulation reaches at least, by output dtype."""

MIN_SQNR_FAST = 43.0
MIN_SQNR_GRAD = 45.0


RECIPES: dict[str, Recipe] = {
    "tensor": TENSOR,
    "row": ROW,
    "block-128x128": BLOCK_128,
    **{
        f"block-{rows}x{columns}": Recipe(Granularity.BLOCK, (rows, columns))
        for rows, columns in ((64, 128), (1, 32), (1, 64), (1, 128), (48, 80))
    },
}
"""Every kind of recipe; the ids of parametrised tests."""


def name_of(value: object) -> str | None:
    """The id of a parametrised dtype; other values keep pytest's own."""
    return dtype_name(value) if isinstance(value, torch.dtype) else None


@dataclass(frozen=True)
class Truth:
    """What a call should give.

    Attributes:
        value: [M, N] float64.
        mass: [M, N] float64, the sum of the absolute products plus |bias|.
    """

    value: torch.Tensor
    mass: torch.Tensor


def dequantized_weight(data: torch.Tensor, scale: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """[N, K] float64 of an FP8 weight [N, K]; written apart from the library's own dequantiser."""
    n, k = data.shape
    rows, columns = block_of(recipe, n, k)
    grid = decode_scale(scale).double().reshape(-(-n // rows), -(-k // columns))
    row_of = torch.arange(n, device=data.device) // rows
    column_of = torch.arange(k, device=data.device) // columns
    return data.float().double() * grid[row_of][:, column_of]


def dequantized_activations(
    x: torch.Tensor,
    recipe: Recipe,
    weight_dtype: torch.dtype = torch.float8_e4m3fn,
    activation_scale: torch.Tensor | None = None,
    rows_per_scale: int = 1,
) -> torch.Tensor:
    """[M, K] float64 of the activations as the design says they are quantised.

    `rows_per_scale` is 128 for the backends that must be named, which scale tiles of tokens.
    """
    flat = x.detach().reshape(-1, x.shape[-1])
    dtype = activation_float8(weight_dtype)
    if activation_scale is not None:
        data = eager.quantize_static(flat, activation_scale.float(), dtype)
        return data.float().double() * activation_scale.double()
    group = min(recipe.group_size(flat.shape[1]), flat.shape[1])
    data, scale = eager.quantize_grid(flat, rows_per_scale, group, dtype)
    row_of = torch.arange(flat.shape[0], device=x.device) // rows_per_scale
    column_of = torch.arange(flat.shape[1], device=x.device) // group
    return data.float().double() * scale.double()[row_of][:, column_of]


def truth(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Truth:
    """The product of dequantised operands, [M, K] and [N, K] float64."""
    value, mass = x @ weight.t(), x.abs() @ weight.abs().t()
    if bias is not None:
        value, mass = value + bias.double(), mass + bias.double().abs()
    return Truth(value, mass)


def linear_truth(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    recipe: Recipe,
    bias: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    rows_per_scale: int = 1,
) -> Truth:
    """What `fp8_linear` of these arguments should give, rows flattened: [M, N]."""
    bias = None if bias is None else bias.detach()
    decoded = None if activation_scale is None else decode_scale(activation_scale.detach())
    return truth(
        dequantized_activations(x, recipe, weight.dtype, decoded, rows_per_scale),
        dequantized_weight(weight.detach(), scale.detach(), recipe),
        bias,
    )


def assert_matches(
    out: torch.Tensor,
    expected: Truth,
    *,
    accumulation: float = EXACT_ACCUMULATION,
    label: str = "",
    min_sqnr: float | None = None,
) -> None:
    """Every element within its bound and every row within its signal-to-noise ratio.

    `min_sqnr` replaces the ratio of the output dtype: a row of a few columns can be one value
    that cancels, or that rounds by the whole unit roundoff of bf16 (48 dB), so its ratio says
    nothing and the bound of each element judges alone.
    """
    got = out.detach().double().reshape(expected.value.shape)
    assert bool(torch.isfinite(got).all()), (
        f"{label}: {int((~torch.isfinite(got)).sum())} not finite"
    )
    worst = bound_used(out, expected, accumulation)
    assert worst <= 1, f"{label}: {worst:.2f} times the per-element bound"
    floor = MIN_SQNR[out.dtype] if accumulation == EXACT_ACCUMULATION else MIN_SQNR_FAST
    floor = floor if min_sqnr is None else min_sqnr
    ratio = sqnr(got, expected.value).min().item()
    assert ratio >= floor, f"{label}: a row at {ratio:.1f} dB, needs {floor}"


def bound_used(out: torch.Tensor, expected: Truth, accumulation: float) -> float:
    """The largest error as a share of the per-element bound; 1 is the limit."""
    got = out.detach().double().reshape(expected.value.shape)
    bound = _ROUNDOFF[out.dtype] * expected.value.abs() + accumulation * expected.mass
    bound += _SUBNORMAL[out.dtype] + 1e-30
    return ((got - expected.value).abs() / bound).max().item()


def assert_gradient(
    got: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    *,
    label: str = "",
    min_sqnr: float = MIN_SQNR_GRAD,
) -> None:
    """dX against ``grad @ weight`` in float64, by element and by row.

    Args:
        got: dX [..., K]; its dtype is that of X.
        grad: dY [..., N], in the dtype that backward computed in.
        weight: [N, K] float64, dequantised and not rounded.
        min_sqnr: decibels that each row reaches; see `assert_matches` about rows of few columns.
    """
    flat = grad.detach().double().reshape(-1, grad.shape[-1])
    value, mass = flat @ weight, flat.abs() @ weight.abs()
    result = got.detach().double().reshape(value.shape)
    assert bool(torch.isfinite(result).all()), f"{label}: dX is not finite"
    # The product is rounded in dY's dtype and then in X's; the weight is rounded in dY's.
    rounding = _ROUNDOFF[got.dtype] + _ROUNDOFF[grad.dtype]
    bound = rounding * value.abs() + (1.01 * _ROUNDOFF[grad.dtype] + 2.0**-16) * mass
    # Below fp16's normal numbers its step is absolute: for a weight, and for the product.
    bound += _SUBNORMAL[grad.dtype] * (1 + flat.abs().sum(-1, keepdim=True))
    bound += _SUBNORMAL[got.dtype] + 1e-30
    worst = ((result - value).abs() / bound).max().item() if value.numel() else 0.0
    assert worst <= 1, f"{label}: dX is {worst:.2f} times the per-element bound"
    ratio = sqnr(result, value).min().item() if value.numel() else float("inf")
    assert ratio >= min_sqnr, f"{label}: a row of dX at {ratio:.1f} dB, needs {min_sqnr}"


def assert_bias_gradient(got: torch.Tensor, grad: torch.Tensor, bias: torch.Tensor) -> None:
    """dBias [N] in the bias's dtype: the sum of dY [..., N] over its rows, added in fp32."""
    assert got.shape == bias.shape
    assert got.dtype == bias.dtype
    flat = grad.detach().double().reshape(-1, grad.shape[-1])
    value, mass = flat.sum(0), flat.abs().sum(0)
    bound = _ROUNDOFF[got.dtype] * value.abs() + 2.0**-20 * mass + _SUBNORMAL[got.dtype] + 1e-30
    worst = ((got.double() - value).abs() / bound).max().item()
    assert worst <= 1, f"dBias is {worst:.2f} times the per-element bound"


def sqnr(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio of each row in dB; a row that should be and is zero counts as exact."""
    noise = (got.double() - expected.double()).square().sum(-1)
    signal = expected.double().square().sum(-1)
    ratio = 10 * torch.log10(signal / noise)
    return torch.where(noise == 0, torch.full_like(ratio, torch.inf), ratio)


def make_weight(
    n: int,
    k: int,
    recipe: Recipe,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight whose scales differ from block to block and are not powers of two."""
    values = torch.randn(n, k, device=device) * 0.05
    rows = torch.rand(n, 1, device=device) + 0.5
    columns = torch.rand(1, k, device=device) + 0.5
    return fp8dispatch.quantize(
        values * rows * columns, recipe, dtype=dtype, scale_dtype=scale_dtype
    )
