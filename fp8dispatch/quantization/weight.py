"""Weights into FP8 and back: `quantize` and `dequantize`, and the strips that backward needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8dispatch.checks import check_activations, check_choice, check_transforms
from fp8dispatch.errors import NumericalOverflowError, ShapeError
from fp8dispatch.formats import (
    ACTIVATION_DTYPES,
    FLOAT8_DTYPES,
    SCALE_DTYPES,
    NonFinite,
    cast,
    check_nonfinite,
    decode_scale,
    dtype_name,
    round_scale,
)
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.probes.device import runs_kernels
from fp8dispatch.quantization import eager
from fp8dispatch.recipe import BLOCK_128, Granularity, Recipe, ceil_div
from fp8dispatch.validate import check_operands


def quantize(
    tensor: torch.Tensor,
    recipe: str | Recipe = BLOCK_128,
    *,
    block_size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    nonfinite: NonFinite = "raise",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix [N, K] into real FP8 data and scales, ``value = data * scale``.

    ``scale = amax / max_value(dtype)`` over the tensor, each row or each block (1 where amax is
    0). A `scale_dtype` other than fp32 is rounded first and the data is divided by the rounded
    scale: E8M0 rounds up to a power of two, so nothing saturates that did not before.

    Args:
        tensor: [N, K] bf16, fp16 or fp32; ragged edges are fine. A meta tensor gives meta tensors.
        recipe: ``"tensor"``, ``"row"``, ``"block"`` or a `Recipe`.
        block_size: ``(block_n, block_k)`` of the block recipe, default (128, 128).
        dtype: an FP8 dtype.
        scale_dtype: float32, bfloat16, float16, float8_e8m0fnu or uint8 (E8M0 exponents).
        nonfinite: ``"raise"``, or ``"saturate"``: scales come from the finite values, infinities
            become the largest value of their block, and NaN stays NaN.

    Returns:
        data [N, K] in `dtype`, and the scale in `scale_dtype`: [1], [N, 1] or
        [ceil(N / block_n), ceil(K / block_k)].

    Raises:
        DTypeError, ShapeError, InvalidInputError: arguments that do not fit.
        NumericalOverflowError: the tensor holds NaN or infinity (unless they saturate), or a
            scale leaves `scale_dtype`.
    """
    chosen = Recipe.parse(recipe, block_size)
    check_transforms(tensor)
    check_activations("tensor", tensor)
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise ShapeError(
            f"tensor must be a matrix [N, K] that is not empty, found shape {list(tensor.shape)}"
        )
    check_choice("dtype", dtype, FLOAT8_DTYPES)
    check_choice("scale_dtype", scale_dtype, SCALE_DTYPES)
    check_nonfinite(nonfinite)
    n, k = tensor.shape
    scale_shape = chosen.scale_shape(n, k)
    if tensor.is_meta:
        return (
            torch.empty((n, k), dtype=dtype, device="meta"),
            torch.empty(scale_shape, dtype=scale_dtype, device="meta"),
        )
    rows, columns = block_of(chosen, n, k)
    with torch.no_grad():
        if nonfinite == "saturate":
            amax = eager.grid_amax(torch.where(tensor.isfinite(), tensor, 0), rows, columns)
            tensor = torch.where(tensor.isnan(), torch.nan, tensor)  # one sign of NaN everywhere
        else:
            amax = eager.grid_amax(tensor, rows, columns)
        if not bool(torch.isfinite(amax).all()):
            raise NumericalOverflowError(
                "quantize needs finite values, found NaN or infinity in the tensor; "
                "repair the weights first, or pass nonfinite='saturate'"
            )
        stored = round_scale(eager.scale_of(amax, dtype), scale_dtype)
        multipliers = decode_scale(stored)
        if not bool(torch.isfinite(multipliers).all()):
            raise NumericalOverflowError(
                f"a scale does not fit {dtype_name(scale_dtype)} (largest amax "
                f"{float(amax.max()):.3g}); use float32 scales"
            )
        spread = eager.expand_grid(multipliers, rows, columns, tensor.shape)
        data = cast(tensor.float() / spread, dtype)
    return data, stored.reshape(scale_shape)


def dequantize(
    data: torch.Tensor,
    scale: torch.Tensor,
    *,
    block_size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``data * scale`` of an FP8 matrix [N, K], multiplied in fp32 and rounded once to `dtype`.

    Args:
        data: [N, K] FP8, any strides.
        scale: multipliers in any shape and dtype that `fp8_linear` takes as a weight scale.
        block_size: as in `fp8_linear`.
        dtype: bfloat16, float16 or float32.

    Raises:
        DTypeError, ShapeError, AmbiguousRecipeError, ScaleValueError: arguments that do not fit.
    """
    check_transforms(data, scale)
    check_choice("dtype", dtype, ACTIVATION_DTYPES)
    operands = check_operands(data, scale, None, block_size, names=("data", "scale"))
    n, k = data.shape
    if data.is_meta:
        return torch.empty((n, k), dtype=dtype, device="meta")
    with torch.no_grad():
        multipliers = weight_scale_fp32(scale, operands.recipe, n, k)
        return dequantize_strip(data, multipliers, operands.recipe, dtype)


def dequantize_strip(
    data: torch.Tensor,
    scale: torch.Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    columns: slice | None = None,
) -> torch.Tensor:
    """Columns of a weight as bf16, fp16 or fp32: never more of it than asked for.

    Args:
        data: [N, K] FP8, any strides; unchecked.
        scale: fp32 in the recipe's canonical shape, as `weight_scale_fp32` gives it.
        columns: a slice of K that starts at a multiple of the block's width; None means all.
    """
    n, k = data.shape
    start, stop, _ = (columns or slice(None)).indices(k)
    rows, width = block_of(recipe, n, k)
    strip = data[:, start:stop]
    grid = scale.reshape(ceil_div(n, rows), ceil_div(k, width))
    grid = grid[:, start // width : ceil_div(stop, width)]
    if runs_kernels(data.device):
        # Imported here because it imports Triton, which is not a requirement of the package.
        from fp8dispatch.kernels.dequantize import dequantize_weight

        out = torch.empty(strip.shape, dtype=dtype, device=data.device)
        dequantize_weight(strip, grid, out, (rows, width))
        return out
    return (strip.float() * eager.expand_grid(grid, rows, width, strip.shape)).to(dtype)


def block_of(recipe: Recipe, n: int, k: int) -> tuple[int, int]:
    """Rows and columns that share one scale in an [n, k] weight, for every recipe."""
    if recipe.block_size is not None:
        return min(recipe.block_size[0], max(n, 1)), min(recipe.block_size[1], max(k, 1))
    return (max(n, 1) if recipe.granularity is Granularity.TENSOR else 1), max(k, 1)
