"""Gradients of an expert matmul: of the rows through the dequantised weights, and of the biases.

    dx[gather[s]] = dy[scatter[s]] @ (b[e] * b_scale[e])        e the expert of sorted row s
    dbias[e]      = sum over the rows s of e of dy[scatter[s]]

Weights are dequantised tile by tile, in registers, and only those of experts that have rows. Every
sum has a fixed order: over N in strips, over rows in chunks, and over the uses of one token in
sorted order (`sum_rows`), so the same call gives the same bits. Rows are found as in
`experts_gemm`; those of no expert get zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8dispatch.kernels.experts_routing import find_tile, map_rows, schedule, tile_bound
from fp8dispatch.kernels.float8 import NATIVE, decode_float8, kernel_operand
from fp8dispatch.kernels.interpreter import INTERPRETED, cast_output
from fp8dispatch.kernels.launch import FP_FUSION, ceil_div, next_power_of_2, on_device_of
from fp8dispatch.kernels.scaled_gemm import tile_origin
from fp8dispatch.kernels.sorted_rows import SortedRows

_GROUP_M = 16  # tile rows that are walked together, as in the forward GEMM


def grad_input(
    grad: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
    block_size: tuple[int, int] | None,
    forward: SortedRows,
    inputs: int,
    *,
    scattered: bool,
) -> None:
    """The gradient of each sorted row, multiplied in the dtype of `grad`, summed in float32.

    Args:
        grad: ``[rows, N]``, bfloat16, float16 or float32, any strides: dY.
        b: ``[E, N, K]``, FP8 of any format, any strides.
        b_scale: float32 multipliers, ``[E, ceil(N / block_n), ceil(K / block_k)]``, or
            ``[E, N, 1]`` without `block_size`; any strides, 0 included.
        out: any strides, a floating dtype: ``[rows, K]``, the gradient of every sorted row; or with
            `scattered` ``[inputs, K]``, that of every row of the input.
        block_size: ``(block_n, block_k)`` of the weight scale, or None.
        forward: the rows of the forward call.
        inputs: rows of its input, T.
        scattered: write rows to where `forward.gather` took them from; it must name each once.
    """
    rows, (experts, n, k) = forward.rows, b.shape
    if rows == 0:
        return
    operand, code = kernel_operand(b)
    share = ceil_div(rows, experts)
    block_m = 16 if share <= 16 else 32 if share <= 32 else 64
    wide = grad.itemsize == 4  # float32: no tensor core, and twice the registers
    block_k = max(16, min(32 if wide else 64, next_power_of_2(k)))
    bounds = torch.empty((2, experts + 1), dtype=torch.int32, device=grad.device)
    schedule(forward.ends, rows, block_m, bounds[0], bounds[1])
    gather, scatter = forward.gather, forward.scatter
    tiles_m = tile_bound(rows, experts, block_m)
    scale_n, scale_k = (1, 0) if block_size is None else block_size
    with on_device_of(grad):
        _grad_input_kernel[(tiles_m * ceil_div(k, block_k),)](
            grad,
            operand,
            b_scale,
            out,
            bounds,
            gather,
            scatter,
            inputs,
            rows,
            tiles_m,
            experts,
            n,
            k,
            scale_n,
            *grad.stride(),
            *b.stride(),
            *b_scale.stride(),
            *out.stride(),
            0 if gather is None else gather.stride(0),
            0 if scatter is None else scatter.stride(0),
            STEPS=(experts + 1).bit_length(),
            SCALE_K=0 if scale_k >= k else scale_k,
            FORMAT=code,
            SCATTERED=scattered,
            BLOCK_M=block_m,
            BLOCK_N=32 if wide else 64,
            BLOCK_K=block_k,
            GROUP_M=_GROUP_M,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
            num_stages=2 if wide else 3,
        )


def grad_bias(grad: torch.Tensor, out: torch.Tensor, forward: SortedRows, inputs: int) -> None:
    """The sum of dY over the rows of each expert, in float32.

    Args:
        grad: ``[rows, N]``, bfloat16, float16 or float32, any strides: dY.
        out: ``[E, N]``, a floating dtype, any strides; experts without rows get zeros.
        forward: the rows of the forward call.
        inputs: rows of its input, T.
    """
    experts, n = out.shape
    bounds = torch.empty((2, experts + 1), dtype=torch.int32, device=grad.device)
    schedule(forward.ends, forward.rows, 1, bounds[0], bounds[1])
    gather, scatter = forward.gather, forward.scatter
    cols = min(128, next_power_of_2(n))
    with on_device_of(grad):
        _grad_bias_kernel[(experts * ceil_div(n, cols),)](
            grad,
            out,
            bounds,
            gather,
            scatter,
            inputs,
            forward.rows,
            n,
            *grad.stride(),
            *out.stride(),
            0 if gather is None else gather.stride(0),
            0 if scatter is None else scatter.stride(0),
            ROWS=32,
            COLS=cols,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )


def sum_rows(
    values: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, out: torch.Tensor
) -> None:
    """``out[t]``: the sum, in float32, of the rows ``values[order[i]]`` for i in the range of t.

    Args:
        values: ``[S, K]``, a floating dtype, any strides.
        order: ``[S]`` int32 or int64, rows of `values`.
        ends: ``[T]`` int32, inclusive cumulative ends of the ranges.
        out: ``[T, K]``, a floating dtype, any strides.
    """
    targets, k = out.shape
    if out.numel() == 0:
        return
    cols = min(1024, next_power_of_2(k))
    with on_device_of(values):
        _sum_rows_kernel[(targets * ceil_div(k, cols),)](
            values,
            order,
            ends,
            out,
            k,
            *values.stride(),
            *out.stride(),
            COLS=cols,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )


@triton.jit(do_not_specialize=["inputs", "rows", "tiles_m"])
def _grad_input_kernel(
    grad_ptr,
    b_ptr,
    b_scale_ptr,
    out_ptr,
    bounds_ptr,  # [2, E + 1]: ends of rows, cumulative tiles
    gather_ptr,
    scatter_ptr,
    inputs,
    rows,
    tiles_m,
    experts,
    n,
    k,
    scale_n,
    grad_stride_m,
    grad_stride_n,
    b_stride_e,
    b_stride_n,
    b_stride_k,
    b_scale_stride_e,
    b_scale_stride_n,
    b_scale_stride_k,
    out_stride_m,
    out_stride_k,
    gather_stride,
    scatter_stride,
    STEPS: tl.constexpr,
    SCALE_K: tl.constexpr,  # 0: one scale column for all of K
    FORMAT: tl.constexpr,
    SCATTERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A [BLOCK_M, BLOCK_K] tile of dX; the loop runs over N."""
    row_tile, first_col = tile_origin(tl.program_id(0), tiles_m, k, 1, BLOCK_K, GROUP_M)
    group, first_row, end_row = find_tile(
        row_tile, bounds_ptr, bounds_ptr + experts + 1, experts + 1, STEPS, BLOCK_M
    )
    row_index = first_row + tl.arange(0, BLOCK_M)
    in_group = row_index < end_row
    source, live = map_rows(scatter_ptr, scatter_stride, row_index, in_group, rows)
    target, arrives = map_rows(gather_ptr, gather_stride, row_index, in_group, inputs)
    live = live & arrives
    if SCATTERED:
        written = arrives
    else:
        written = in_group
        target = row_index.to(tl.int64)
    expert = tl.minimum(group, experts - 1).to(tl.int64)
    cols = (first_col + tl.arange(0, BLOCK_K)).to(tl.int64)
    col_valid = cols < k
    grad_rows = grad_ptr + source * grad_stride_m
    b_expert = b_ptr + expert * b_stride_e
    scale_expert = b_scale_ptr + expert * b_scale_stride_e
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    steps = tl.where(group < experts, tl.cdiv(n, BLOCK_N), 0)  # none: zeros for the rest
    for step in range(steps):
        depth_index = step * BLOCK_N + tl.arange(0, BLOCK_N)
        depth = depth_index.to(tl.int64)
        depth_valid = depth_index < n
        grad = tl.load(
            grad_rows[:, None] + (depth * grad_stride_n)[None, :],
            mask=live[:, None] & depth_valid[None, :],
            other=0.0,
        )
        b_places = b_expert + depth[:, None] * b_stride_n + cols[None, :] * b_stride_k
        valid = depth_valid[:, None] & col_valid[None, :]
        if FORMAT == NATIVE:
            weight = tl.load(b_places, mask=valid, other=0.0).to(tl.float32)
        else:
            code = tl.load(b_places, mask=valid, other=0)
            weight = decode_float8(code, FORMAT).to(tl.float32)
        scale_rows = scale_expert + (depth_index // scale_n).to(tl.int64) * b_scale_stride_n
        if SCALE_K == 0:
            weight *= tl.load(scale_rows, mask=depth_valid, other=0.0)[:, None]
        elif SCALE_K % BLOCK_K == 0:
            scale_rows += (first_col // SCALE_K).to(tl.int64) * b_scale_stride_k
            weight *= tl.load(scale_rows, mask=depth_valid, other=0.0)[:, None]
        else:
            scale_places = scale_rows[:, None] + ((cols // SCALE_K) * b_scale_stride_k)[None, :]
            weight *= tl.load(scale_places, mask=valid, other=0.0)
        weight = cast_output(weight, grad_ptr.dtype.element_ty)
        if INTERPRETED:  # whose dot takes the bits of bfloat16 for integers
            grad = grad.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(grad, weight, acc, input_precision="ieee")
    acc = tl.where(live[:, None], acc, 0.0)
    places = out_ptr + target[:, None] * out_stride_m + cols[None, :] * out_stride_k
    valid_out = written[:, None] & col_valid[None, :]
    tl.store(places, cast_output(acc, out_ptr.dtype.element_ty), mask=valid_out)


@triton.jit(do_not_specialize=["inputs", "rows"])
def _grad_bias_kernel(
    grad_ptr,
    out_ptr,
    bounds_ptr,
    gather_ptr,
    scatter_ptr,
    inputs,
    rows,
    n,
    grad_stride_m,
    grad_stride_n,
    out_stride_e,
    out_stride_n,
    gather_stride,
    scatter_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """COLS columns of one expert."""
    programs_per_expert = tl.cdiv(n, COLS)
    expert = tl.program_id(0) // programs_per_expert
    cols = ((tl.program_id(0) % programs_per_expert) * COLS + tl.arange(0, COLS)).to(tl.int64)
    first = tl.where(expert > 0, tl.load(bounds_ptr + tl.maximum(expert - 1, 0)), 0)
    end = tl.load(bounds_ptr + expert)
    total = tl.zeros((COLS,), tl.float32)
    for start in range(first, end, ROWS):
        row_index = start + tl.arange(0, ROWS)
        source, live = map_rows(scatter_ptr, scatter_stride, row_index, row_index < end, rows)
        _, arrives = map_rows(gather_ptr, gather_stride, row_index, live, inputs)
        places = grad_ptr + source[:, None] * grad_stride_m + (cols * grad_stride_n)[None, :]
        grad = tl.load(places, mask=arrives[:, None] & (cols < n)[None, :], other=0.0)
        total += tl.sum(grad.to(tl.float32), axis=0)
    places = out_ptr + expert.to(tl.int64) * out_stride_e + cols * out_stride_n
    tl.store(places, cast_output(total, out_ptr.dtype.element_ty), mask=cols < n)


@triton.jit
def _sum_rows_kernel(
    values_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,
    k,
    values_stride_row,
    values_stride_col,
    out_stride_row,
    out_stride_col,
    COLS: tl.constexpr,
):
    """COLS columns of one sum."""
    programs_per_row = tl.cdiv(k, COLS)
    row = tl.program_id(0) // programs_per_row
    cols = ((tl.program_id(0) % programs_per_row) * COLS + tl.arange(0, COLS)).to(tl.int64)
    first = tl.where(row > 0, tl.load(ends_ptr + tl.maximum(row - 1, 0)), 0)
    end = tl.load(ends_ptr + row)
    total = tl.zeros((COLS,), tl.float32)
    for index in range(first, end):
        source = tl.load(order_ptr + index).to(tl.int64)
        places = values_ptr + source * values_stride_row + cols * values_stride_col
        total += tl.load(places, mask=cols < k, other=0.0).to(tl.float32)
    places = out_ptr + row.to(tl.int64) * out_stride_row + cols * out_stride_col
    tl.store(places, cast_output(total, out_ptr.dtype.element_ty), mask=cols < k)
