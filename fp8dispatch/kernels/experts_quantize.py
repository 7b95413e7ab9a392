"""Static quantisation of rows sorted by expert, each with the scale of its own expert.

Only where every expert has a scale of its own does a row's quantisation depend on who uses it: it
is then gathered and quantised in one go, once for each use. Everything else is quantised where it
lies, by `quantize_activation`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8dispatch.formats import max_value
from fp8dispatch.kernels.experts_routing import find_group, map_rows, schedule
from fp8dispatch.kernels.float8 import kernel_operand
from fp8dispatch.kernels.launch import FP_FUSION, ceil_div, next_power_of_2, on_device_of
from fp8dispatch.kernels.quantize_activation import quantize_tile_static
from fp8dispatch.kernels.sorted_rows import SortedRows

_TILE = 4096  # elements


def quantize_sorted_static(
    x: torch.Tensor,
    scale: torch.Tensor,
    data: torch.Tensor,
    row_scale: torch.Tensor,
    sorted_rows: SortedRows,
) -> None:
    """Gather rows and divide them by the scale of their expert, as `quantize_static` does.

    Args:
        x: ``[T, K]``, bfloat16, float16 or float32, any strides.
        scale: ``[E]`` positive float32 multipliers, any stride.
        data: ``[rows, K]`` output, float8_e4m3fn or float8_e4m3fnuz, last stride 1; zeros where
            `gather` leads nowhere.
        row_scale: ``[rows]`` float32 output: the scale of each row's expert.
        sorted_rows: Which rows go to which expert.
    """
    rows, k = data.shape
    experts = scale.shape[0]
    if rows == 0:
        return
    bounds = torch.empty((2, experts + 1), dtype=torch.int32, device=x.device)
    schedule(sorted_rows.ends, rows, 1, bounds[0], bounds[1])
    gather = sorted_rows.gather
    out, code = kernel_operand(data)
    block_cols = min(next_power_of_2(k), 1024)
    block_rows = max(1, min(next_power_of_2(rows), _TILE // block_cols)) if rows > 64 else 1
    programs = ceil_div(rows, block_rows) * ceil_div(k, block_cols)
    with on_device_of(x):
        _quantize_sorted_kernel[(programs,)](
            x,
            out,
            scale,
            row_scale,
            bounds,
            gather,
            x.shape[0],
            rows,
            k,
            experts,
            *x.stride(),
            out.stride(0),
            scale.stride(0),
            0 if gather is None else gather.stride(0),
            STEPS=(experts + 1).bit_length(),
            MAX=max_value(data.dtype),
            FORMAT=code,
            ROWS=block_rows,
            COLS=block_cols,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )


@triton.jit(do_not_specialize=["inputs", "rows"])
def _quantize_sorted_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    row_scale_ptr,
    bounds_ptr,
    gather_ptr,
    inputs,
    rows,
    k,
    experts,
    x_stride_row,
    x_stride_col,
    data_stride_row,
    scale_stride,
    gather_stride,
    STEPS: tl.constexpr,
    MAX: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A [ROWS, COLS] tile; neighbouring programs share rows."""
    programs_per_row = tl.cdiv(k, COLS)
    row_index = (tl.program_id(0) // programs_per_row) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % programs_per_row) * COLS + tl.arange(0, COLS)
    valid = row_index < rows
    group = find_group(bounds_ptr, row_index, experts + 1, STEPS)
    expert = tl.minimum(group, experts - 1).to(tl.int64)
    scale = tl.load(scale_ptr + expert * scale_stride, mask=valid, other=1.0)
    source, live = map_rows(gather_ptr, gather_stride, row_index, valid, inputs)
    x_places = x_ptr + source[:, None] * x_stride_row
    x_places += (cols.to(tl.int64) * x_stride_col)[None, :]
    x = tl.load(x_places, mask=live[:, None] & (cols < k)[None, :], other=0.0).to(tl.float32)
    code = quantize_tile_static(
        x, tl.broadcast_to(scale[:, None], (ROWS, COLS)), data_ptr.dtype.element_ty, MAX, FORMAT
    )
    places = data_ptr + row_index.to(tl.int64)[:, None] * data_stride_row + cols[None, :]
    tl.store(places, code, mask=valid[:, None] & (cols < k)[None, :])
    named = tl.where(tl.program_id(0) % programs_per_row == 0, rows, 0)  # once for each row
    tl.store(row_scale_ptr + row_index, scale, mask=row_index < named)
