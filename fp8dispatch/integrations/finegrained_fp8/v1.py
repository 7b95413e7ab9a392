"""The names of the hub kernel ``finegrained-fp8``, version 1, with their signatures.

A block-wise function takes a block size; a tensor-wide one has a scale for the whole weight and
one for each row of the activations; the one without either in its name is tensor-wide where
`block_size` is None or as large as the weight. What is called batched or grouped takes raw
activations and gives their dtype; rows of no expert are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8dispatch.integrations.finegrained_fp8.weights import is_tensor_wide, tensor_scale
from fp8dispatch.integrations.unsloth import act_quant
from fp8dispatch.linear import fp8_linear_quantized
from fp8dispatch.moe.matmul import fp8_experts_batched, fp8_experts_grouped
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


def w8a8_tensor_fp8_matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    As: torch.Tensor,
    Bs: torch.Tensor,
    output_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``A @ B.T`` with one scale for each row of A and one for B, [..., N] in `output_dtype`.

    Args:
        A: [..., K] FP8 activations, `As` their fp32 scales, one for each row in any shape, or one.
        B: [N, K] FP8 weight, `Bs` its scale of one element.
        output_dtype: bfloat16, float16 or float32.

    Raises:
        InvalidInputError: operands that do not fit together.
    """
    scale = As.reshape(-1, 1) if As.numel() != 1 else As.reshape(1)
    return fp8_linear_quantized(
        QuantizedActivation(A, scale), B, tensor_scale(B, Bs), out_dtype=output_dtype
    )


def w8a8_fp8_matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    As: torch.Tensor,
    Bs: torch.Tensor,
    block_size: Sequence[int] | None,
    output_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`w8a8_tensor_fp8_matmul` or `w8a8_block_fp8_matmul`, as the block size says."""
    if is_tensor_wide(B, block_size):
        return w8a8_tensor_fp8_matmul(A, B, As, Bs, output_dtype)
    assert block_size is not None  # which tensor-wide scales are
    return w8a8_block_fp8_matmul(A, B, As, Bs, block_size, output_dtype)


def w8a8_block_fp8_matmul_batched(
    A: torch.Tensor,
    B: torch.Tensor,
    Bs: torch.Tensor,
    expert_ids: torch.Tensor,
    block_size: Sequence[int],
) -> torch.Tensor:
    """Each row of A times the weight of its expert, [S, N] in the dtype of A.

    Args:
        A: [S, K] bfloat16, float16 or float32.
        B: [E, N, K] FP8, `Bs` its scales [E, ceil(N / block_n), ceil(K / block_k)].
        expert_ids: [S] integers of any width and stride; a row whose id is below 0 or from E on
            is zero.
        block_size: [block_n, block_k].

    Raises:
        InvalidInputError: operands that do not fit together.
    """
    return fp8_experts_batched(A, B, Bs, expert_ids, block_size=block_size, out_dtype=A.dtype)


def w8a8_tensor_fp8_matmul_batched(
    A: torch.Tensor, B: torch.Tensor, Bs: torch.Tensor, expert_ids: torch.Tensor
) -> torch.Tensor:
    """`w8a8_block_fp8_matmul_batched` with one scale for each expert, `Bs` [E] or [E, 1, 1]."""
    return fp8_experts_batched(A, B, tensor_scale(B, Bs), expert_ids, out_dtype=A.dtype)


def w8a8_fp8_matmul_batched(
    A: torch.Tensor,
    B: torch.Tensor,
    Bs: torch.Tensor,
    expert_ids: torch.Tensor,
    block_size: Sequence[int] | None,
) -> torch.Tensor:
    """The tensor-wide or the block-wise one, as the block size says."""
    if is_tensor_wide(B, block_size):
        return w8a8_tensor_fp8_matmul_batched(A, B, Bs, expert_ids)
    assert block_size is not None  # which tensor-wide scales are
    return w8a8_block_fp8_matmul_batched(A, B, Bs, expert_ids, block_size)


def w8a8_block_fp8_matmul_grouped(
    A: torch.Tensor,
    B: torch.Tensor,
    Bs: torch.Tensor,
    offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    block_size: Sequence[int],
) -> torch.Tensor:
    """Rows sorted by expert, each times the weight of its expert, [S, N] in the dtype of A.

    Args:
        A: [S, K] bfloat16, float16 or float32, sorted by expert.
        B: [E, N, K] FP8, `Bs` its scales [E, ceil(N / block_n), ceil(K / block_k)].
        offsets: [E] integers, inclusive cumulative ends of the experts' rows; rows behind the
            last one are zero.
        tokens_per_expert: not read, since `offsets` says the same.
        block_size: [block_n, block_k].

    Raises:
        InvalidInputError: operands that do not fit together.
    """
    return fp8_experts_grouped(A, B, Bs, offsets, block_size=block_size, out_dtype=A.dtype)


def w8a8_tensor_fp8_matmul_grouped(
    A: torch.Tensor,
    B: torch.Tensor,
    Bs: torch.Tensor,
    offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """`w8a8_block_fp8_matmul_grouped` with one scale for each expert, `Bs` [E] or [E, 1, 1]."""
    return fp8_experts_grouped(A, B, tensor_scale(B, Bs), offsets, out_dtype=A.dtype)


def w8a8_fp8_matmul_grouped(
    A: torch.Tensor,
    B: torch.Tensor,
    Bs: torch.Tensor,
    offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    block_size: Sequence[int] | None,
) -> torch.Tensor:
    """The tensor-wide or the block-wise one, as the block size says."""
    if is_tensor_wide(B, block_size):
        return w8a8_tensor_fp8_matmul_grouped(A, B, Bs, offsets, tokens_per_expert)
    assert block_size is not None  # which tensor-wide scales are
    return w8a8_block_fp8_matmul_grouped(A, B, Bs, offsets, tokens_per_expert, block_size)
