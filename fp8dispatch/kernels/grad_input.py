"""The gradient of a linear's input, ``dX = dY @ W``, from the FP8 weight as it is stored.

    dX [M, K] = dY [M, N] @ round(float32(data [N, K]) * scale)

The weight is dequantised tile by tile in registers and rounded to the dtype of dY, so that nothing
of it is ever written to memory in more than a byte an element, and the numbers are those of
`dequantize` followed by a matmul: 16-bit operands (or float32 ones, multiplied as such), a float32
accumulator over all of N.

Design: a program owns a [BLOCK_M, BLOCK_K] tile of dX and walks N. Each element of a weight tile is
converted once for BLOCK_M rows, so the tiles are tall (128 rows are what should hide two or three
instructions an element behind the tensor core: reasoned, not measured). dX tiles are walked in
groups of rows that share weight tiles in L2. Row offsets are 64-bit, strides are free, ragged edges
are masked.

Limits: no split along N, so few rows with a small K leave SMs idle; scales that change within a
tile (groups of 32 and 64) are loaded for each element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from fp8dispatch.kernels.float8 import kernel_operand
from fp8dispatch.kernels.interpreter import cast_output
from fp8dispatch.kernels.launch import FP_FUSION, ceil_div, next_power_of_2, on_device_of
from fp8dispatch.kernels.scaled_gemm import tile_origin
from fp8dispatch.kernels.weight_tile import dot_operand, load_weight_tile, scale_blocks

if TYPE_CHECKING:
    import torch

_GROUP_M = 16  # tile rows that are walked together, as in the forward GEMM


def grad_input(
    grad: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    block_size: tuple[int, int] | None,
) -> None:
    """Multiply the gradient of the output by the dequantised weight into `out`.

    Args:
        grad: ``[M, N]``, bfloat16, float16 or float32, any strides, 0 included: dY.
        data: ``[N, K]``, FP8 of any format, any strides.
        scale: float32 multipliers, ``[ceil(N / block_n), ceil(K / block_k)]``, or ``[N, 1]``
            without `block_size`; any strides, 0 included.
        out: ``[M, K]``, bfloat16, float16 or float32, any strides; every element is written.
        block_size: ``(block_n, block_k)`` of the scale, or None for one scale per row of `data`.
    """
    m, n = grad.shape
    k = data.shape[1]
    if m == 0 or k == 0:
        return
    operand, code = kernel_operand(data)
    scale_n, scale_k = scale_blocks(n, k, block_size)
    block_m, block_n, block_k, warps, stages = tile_of(m, k, grad.element_size())
    if scale_n % block_n and scale_k % block_k:
        stages = 2  # a scale for each element travels with the tile, and takes four times its room
    with on_device_of(grad):
        _grad_input_kernel[(ceil_div(m, block_m) * ceil_div(k, block_k),)](
            grad,
            operand,
            scale,
            out,
            m,
            n,
            k,
            *grad.stride(),
            *data.stride(),
            *scale.stride(),
            *out.stride(),
            SCALE_N=scale_n,
            SCALE_K=scale_k,
            FORMAT=code,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=_GROUP_M,
            num_warps=warps,
            enable_fp_fusion=FP_FUSION,
            num_stages=stages,
        )


def tile_of(m: int, k: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages for an output ``[m, k]``.

    Args:
        itemsize: bytes of an element of the gradient. Four: the product runs on the CUDA cores,
            whose operands are twice as wide, so tiles are a quarter.
    """
    cols = max(16, next_power_of_2(k))
    rows = max(16, next_power_of_2(m))
    if itemsize == 4:
        return min(rows, 64), 32, min(cols, 64), 4, 2
    if m <= 64:  # bound by the weight's bytes: many programs, each with several tiles in flight
        return rows, 64, min(cols, 64), 4, 4
    return min(rows, 128), 64, min(cols, 128), 8, 3


@triton.jit(do_not_specialize=["m"])
def _grad_input_kernel(
    grad_ptr,
    data_ptr,
    scale_ptr,
    out_ptr,
    m,
    n,
    k,
    grad_stride_m,
    grad_stride_n,
    data_stride_n,
    data_stride_k,
    scale_stride_n,
    scale_stride_k,
    out_stride_m,
    out_stride_k,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A [BLOCK_M, BLOCK_K] tile of dX; the loop runs over N."""
    first_row, first_col = tile_origin(tl.program_id(0), m, k, BLOCK_M, BLOCK_K, GROUP_M)
    row_index = first_row + tl.arange(0, BLOCK_M)
    row_valid = row_index < m
    rows = row_index.to(tl.int64)
    grad_rows = grad_ptr + rows * grad_stride_m
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for first_n in range(0, n, BLOCK_N):
        depth = first_n + tl.arange(0, BLOCK_N)
        grad = tl.load(
            grad_rows[:, None] + (depth.to(tl.int64) * grad_stride_n)[None, :],
            mask=row_valid[:, None] & (depth < n)[None, :],
            other=0.0,
        )
        weight = load_weight_tile(
            data_ptr, scale_ptr, first_n, first_col, n, k,
            data_stride_n, data_stride_k, scale_stride_n, scale_stride_k,
            SCALE_N, SCALE_K, FORMAT, BLOCK_N, BLOCK_K, grad_ptr.dtype.element_ty,
        )  # fmt: skip
        acc = tl.dot(dot_operand(grad), weight, acc, input_precision="ieee")
    cols = (first_col + tl.arange(0, BLOCK_K)).to(tl.int64)
    places = out_ptr + rows[:, None] * out_stride_m + cols[None, :] * out_stride_k
    valid = row_valid[:, None] & (cols < k)[None, :]
    tl.store(places, cast_output(acc, out_ptr.dtype.element_ty), mask=valid)
