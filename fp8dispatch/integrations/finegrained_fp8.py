"""The names of the hub kernel ``finegrained-fp8``, version 1, with their signatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8dispatch.integrations.unsloth import act_quant
from fp8dispatch.linear import fp8_linear_quantized
from fp8dispatch.quantization.activation import QuantizedActivation


def fp8_act_quant(x: torch.Tensor, block_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations to e4m3fn with one scale per `block_size` columns.

    Args:
        x: [..., K] bfloat16, float16 or float32; K may be ragged.
        block_size: columns per scale.

    Returns:
        data [..., K], and scales [..., ceil(K / block_size)] in fp32, ``value = data * scale``.
    """
    return act_quant(x, block_size)


def w8a8_block_fp8_matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    As: torch.Tensor,
    Bs: torch.Tensor,
    block_size: Sequence[int],
    output_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``A @ B.T`` of quantised operands, [..., N] in `output_dtype`, on the first fitting backend.

    Args:
        A: [..., K] FP8 activations, `As` their scales [..., ceil(K / block_k)] in fp32.
        B: [N, K] FP8 weight, `Bs` its scales [ceil(N / block_n), ceil(K / block_k)].
        block_size: [block_n, block_k].
        output_dtype: bfloat16, float16 or float32.

    Raises:
        InvalidInputError: operands that do not fit together.
    """
    return fp8_linear_quantized(
        QuantizedActivation(A, As), B, Bs, block_size=block_size, out_dtype=output_dtype
    )
