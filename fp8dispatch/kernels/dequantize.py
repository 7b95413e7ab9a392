"""Dequantisation of an FP8 weight, or of a strip of one, into a floating tensor.

    out = float32(data) * scale, rounded once

Design: one [rows, columns] tile per program. The scale is loaded as one number for each row of the
tile where a tile's columns lie inside one scale block, else for each element (those loads hit L1).
A strip of columns is a view: its first column has to start a scale block, and the caller passes the
scale columns that belong to it. Offsets of rows are 64-bit, and any strides are right.

Limits: reading and writing in different orders (a transposed `data`, row-major `out`) is right but
slow, since nothing is staged through shared memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from fp8dispatch.kernels.float8 import NATIVE, decode_float8, kernel_operand
from fp8dispatch.kernels.interpreter import cast_output
from fp8dispatch.kernels.launch import FP_FUSION, ceil_div, next_power_of_2, on_device_of

if TYPE_CHECKING:
    import torch

_TILE = 4096  # elements: 32 for each of 128 threads
_WIDEST = 512  # columns


def dequantize_weight(
    data: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    block_size: tuple[int, int] | None,
) -> None:
    """Write ``data * scale`` into `out`.

    Args:
        data: ``[N, K]``, FP8 of any format, any strides.
        scale: float32 multipliers, ``[ceil(N / block_n), ceil(K / block_k)]``, or ``[N, 1]``
            without `block_size`; any strides, 0 included.
        out: ``[N, K]``, bfloat16, float16 or float32, any strides.
        block_size: ``(block_n, block_k)`` of the scale, or None for one scale per row.
    """
    n, k = data.shape
    if n == 0 or k == 0:
        return
    operand, code = kernel_operand(data)
    scale_n, scale_k = (1, k) if block_size is None else block_size
    cols = min(next_power_of_2(min(scale_k, k)), _WIDEST)
    while cols > 64 and scale_k < k and scale_k % cols:
        cols //= 2
    cols = max(cols, min(64, next_power_of_2(k)))
    rows = max(1, min(next_power_of_2(n), _TILE // cols))
    with on_device_of(data):
        _dequantize_kernel[(ceil_div(n, rows) * ceil_div(k, cols),)](
            operand,
            scale,
            out,
            n,
            k,
            data.stride(0),
            data.stride(1),
            scale.stride(0),
            scale.stride(1),
            out.stride(0),
            out.stride(1),
            scale_n,
            SCALE_K=0 if scale_k >= k else scale_k,
            FORMAT=code,
            ROWS=rows,
            COLS=cols,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )


@triton.jit
def _dequantize_kernel(
    data_ptr,
    scale_ptr,
    out_ptr,
    n,
    k,
    data_stride_n,
    data_stride_k,
    scale_stride_n,
    scale_stride_k,
    out_stride_n,
    out_stride_k,
    scale_n,
    SCALE_K: tl.constexpr,  # 0: one scale column for all of K
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A [ROWS, COLS] tile; neighbouring programs share rows."""
    programs_per_row = tl.cdiv(k, COLS)
    first_col = (tl.program_id(0) % programs_per_row) * COLS
    row_index = (tl.program_id(0) // programs_per_row) * ROWS + tl.arange(0, ROWS)
    rows = row_index.to(tl.int64)
    cols = (first_col + tl.arange(0, COLS)).to(tl.int64)
    valid = (rows < n)[:, None] & (cols < k)[None, :]

    code = tl.load(
        data_ptr + rows[:, None] * data_stride_n + cols[None, :] * data_stride_k, mask=valid
    )
    value = (code if FORMAT == NATIVE else decode_float8(code, FORMAT)).to(tl.float32)

    scale_rows = scale_ptr + (row_index // scale_n).to(tl.int64) * scale_stride_n
    if SCALE_K == 0:
        value *= tl.load(scale_rows, mask=rows < n, other=0.0)[:, None]
    elif SCALE_K % COLS == 0:
        scale_rows += (first_col // SCALE_K).to(tl.int64) * scale_stride_k
        value *= tl.load(scale_rows, mask=rows < n, other=0.0)[:, None]
    else:
        places = scale_rows[:, None] + ((cols // SCALE_K) * scale_stride_k)[None, :]
        value *= tl.load(places, mask=valid, other=0.0)

    places = out_ptr + rows[:, None] * out_stride_n + cols[None, :] * out_stride_k
    tl.store(places, cast_output(value, out_ptr.dtype.element_ty), mask=valid)
