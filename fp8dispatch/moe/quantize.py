"""`quantize_experts` and `dequantize_experts`: the weights of all experts into FP8 and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8dispatch.checks import check_activations, check_choice
from fp8dispatch.errors import NumericalOverflowError, ShapeError
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, SCALE_DTYPES
from fp8dispatch.moe.validate import check_expert_operands
from fp8dispatch.quantization.weight import dequantize, quantize
from fp8dispatch.recipe import BLOCK_128, Recipe


def quantize_experts(
    tensor: torch.Tensor,
    recipe: str | Recipe = BLOCK_128,
    *,
    block_size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the weights [E, N, K] of experts, each by itself as `fp8dispatch.quantize` does.

    Beside the result only one expert's intermediate values exist at a time.

    Args:
        tensor: [E, N, K] bf16, fp16 or fp32. A meta tensor gives meta tensors.
        recipe, block_size, dtype, scale_dtype: as in `fp8dispatch.quantize`.

    Returns:
        data [E, N, K] in `dtype`, and the scale in `scale_dtype`: [E, 1], [E, N, 1] or
        [E, ceil(N / block_n), ceil(K / block_k)].

    Raises:
        DTypeError, ShapeError, InvalidInputError: arguments that do not fit.
        NumericalOverflowError: an expert holds NaN or infinity, or a scale leaves `scale_dtype`;
            the message names the expert.
    """
    chosen = Recipe.parse(recipe, block_size)
    check_activations("tensor", tensor)
    if tensor.dim() != 3 or tensor.numel() == 0:
        raise ShapeError(
            f"tensor must be [E, N, K] with at least one expert, row and column, found shape "
            f"{list(tensor.shape)}; fp8dispatch.quantize takes a single matrix"
        )
    check_choice("dtype", dtype, FLOAT8_DTYPES)
    check_choice("scale_dtype", scale_dtype, SCALE_DTYPES)
    experts, n, k = tensor.shape
    data = torch.empty(tensor.shape, dtype=torch.uint8, device=tensor.device).view(dtype)
    shape = (experts, *chosen.scale_shape(n, k))
    scale = torch.empty(shape, dtype=scale_dtype, device=tensor.device)
    if tensor.is_meta:
        return data, scale
    for index, expert in enumerate(tensor.detach()):
        try:
            values, multipliers = quantize(expert, chosen, dtype=dtype, scale_dtype=scale_dtype)
        except NumericalOverflowError as error:
            raise NumericalOverflowError(f"expert {index}: {error}") from error
        data[index] = values
        scale[index] = multipliers
    return data, scale


def dequantize_experts(
    data: torch.Tensor,
    scale: torch.Tensor,
    *,
    block_size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``data * scale`` of experts [E, N, K], multiplied in fp32 and rounded once to `dtype`.

    Args:
        data: [E, N, K] FP8.
        scale: multipliers in any shape and dtype that `fp8_experts_grouped` takes.
        block_size: as in `fp8_linear`.
        dtype: bfloat16, float16 or float32.

    Raises:
        DTypeError, ShapeError, AmbiguousRecipeError, ScaleValueError: arguments that do not fit.
    """
    check_choice("dtype", dtype, ACTIVATION_DTYPES)
    operands = check_expert_operands(data, scale, data.shape[-1], block_size)
    recipe = operands.recipe
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    if data.is_meta:
        return out
    shape = recipe.scale_shape(*data.shape[1:])
    for index, (weight, multipliers) in enumerate(zip(data, scale, strict=True)):
        one = multipliers.reshape(shape)
        out[index] = dequantize(weight, one, block_size=recipe.block_size, dtype=dtype)
    return out
