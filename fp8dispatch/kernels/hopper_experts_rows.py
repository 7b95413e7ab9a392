"""Rows for `hopper_experts`: gathered, quantised and sorted by expert, with a table of its tiles.

One launch behind `experts_routing.schedule`, portable Triton:

* each sorted row that an expert multiplies is read where `gather` says, quantised, and written to
  its place in [S, K]; the scales of a group lie side by side, as the GEMM's tensor map reads them,
  and those of an expert begin at a multiple of 16 bytes (`hopper_experts_config.first_scale`);
* ``targets[s]`` is where `scatter` sends the row, or -1 for a row that nobody multiplies: it has no
  expert, or an index leads nowhere. Where such a row has a place in the output, zeros go there;
* the table says how many tiles of 128 rows there are, and of each its expert, the expert's first
  and last row, and the tiles of the experts before.

A token that several experts use is quantised again for each: reading bf16 once more for each use,
often from L2, takes the place of a pass over FP8 rows that copies them apart. The numbers are those
of `quantize_activation`, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from fp8dispatch.formats import max_value
from fp8dispatch.kernels.experts_routing import find_group, map_rows
from fp8dispatch.kernels.float8 import kernel_operand
from fp8dispatch.kernels.launch import (
    Launch,
    ceil_div,
    next_power_of_2,
    on_device_of,
    plain_launch,
)
from fp8dispatch.kernels.quantize_activation import (
    _divide,
    _encode,
    _scale_of,
    quantize_tile_static,
)

if TYPE_CHECKING:
    import torch

    from fp8dispatch.kernels.sorted_rows import SortedRows

GROUP = 128
_ENTRIES = 128  # of the table, for each program that writes some
_CLEARED = 256  # columns of zeros at a time
_TILE = 4096  # elements


def prepare_rows(
    x: torch.Tensor,
    static_scale: torch.Tensor | None,
    data: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    index: torch.Tensor,
    targets: torch.Tensor,
    table: torch.Tensor,
    routed: SortedRows,
    *,
    whole_rows: bool,
    launch: Launch = plain_launch,
) -> None:
    """Quantise the rows that experts multiply, and lay out the tiles of `hopper_experts`.

    Args:
        x: ``[T, K]``, bfloat16, float16 or float32, any strides.
        static_scale: ``[E]`` positive float32 multipliers of any stride, or None.
        data: ``[S, K]`` output, float8_e4m3fn, contiguous; rows nobody multiplies stay as they are.
        scale: ``[groups, scale_columns(S, E)]`` float32 output, last stride 1; groups is
            ceil(K / 128), or 1 with `whole_rows`. What no row has stays as it is.
        out: ``[S, N]``, contiguous: the output of the multiplication.
        index: ``[2, E + 1]`` int32, contiguous, as `experts_routing.schedule` writes it for tiles
            of 128 rows.
        targets: ``[S]`` int32 output.
        table: int32 ``[1 + tiles, 4]`` output, contiguous, for at least as many tiles as
            `experts_routing.tile_bound` says; entries that no tile has stay as they are.
        routed: Which rows go to which expert.
        whole_rows: One scale for each row; computed, K is then at most
            `hopper_experts_config.LONGEST_ROW`.
        launch: How the kernel is started.
    """
    (rows, k), n = data.shape, out.shape[1]
    experts = index.shape[1] - 1
    operand, code = kernel_operand(data)
    chunks = ceil_div(k, GROUP)
    one_amax = whole_rows and static_scale is None
    block_groups = next_power_of_2(chunks) if one_amax else min(2, chunks)
    # Few rows need many small programs; from some thousands on, wide loads and few instructions.
    elements = _TILE if rows > 1024 else 1024 if rows > 64 else 1
    block_rows = max(1, elements // (block_groups * GROUP))  # far fewer than entries of a program
    programs_per_row = ceil_div(chunks, block_groups)
    gather, scatter = routed.gather, routed.scatter
    arguments = (
        x, operand, scale, out, static_scale, index, gather, scatter, targets, table,
        x.shape[0], rows, table.shape[0] - 1, experts, k, n, scale.shape[0],
        *x.stride(), scale.stride(0),
        0 if static_scale is None else static_scale.stride(0),
        0 if gather is None else gather.stride(0),
        0 if scatter is None else scatter.stride(0),
    )  # fmt: skip
    constants = {
        "ONE_AMAX": one_amax,
        "STEPS": (experts + 1).bit_length(),
        "MAX": max_value(data.dtype),
        "FORMAT": code,
        "ROWS": block_rows,
        "GROUPS": block_groups,
        "ENTRIES": _ENTRIES,
        "CLEARED": _CLEARED,
    }
    warps = min(16, max(4, block_rows * block_groups * GROUP // 1024))
    with on_device_of(x):
        programs = ceil_div(rows, block_rows) * programs_per_row
        launch(_prepare_kernel, programs, arguments, constants, warps)


@triton.jit(
    do_not_specialize=["inputs", "rows", "most_tiles", "scale_pitch", "gather_stride"],
)
def _prepare_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    out_ptr,
    static_ptr,
    index_ptr,
    gather_ptr,
    scatter_ptr,
    targets_ptr,
    table_ptr,
    inputs,
    rows,
    most_tiles,
    experts,
    k,
    n,
    scale_groups,
    x_stride_row,
    x_stride_col,
    scale_pitch,
    static_stride,
    gather_stride,
    scatter_stride,
    ONE_AMAX: tl.constexpr,
    STEPS: tl.constexpr,
    MAX: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    ENTRIES: tl.constexpr,
    CLEARED: tl.constexpr,
):
    """ROWS rows and GROUPS groups of columns; the first programs also write the table."""
    program = tl.program_id(0)
    tile_bounds = index_ptr + experts + 1
    if program * ENTRIES < most_tiles:
        _write_entries(
            program * ENTRIES, most_tiles, index_ptr, tile_bounds, table_ptr, experts,
            STEPS, ENTRIES,
        )  # fmt: skip
    programs_per_row = tl.cdiv(tl.cdiv(k, 128), GROUPS)
    group_block = program % programs_per_row
    row = (program // programs_per_row) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    covered = tl.load(index_ptr + experts - 1)  # rows behind it belong to no expert
    target, named = map_rows(scatter_ptr, scatter_stride, row, valid, rows)
    owned = named & (row < covered)
    source, live = map_rows(gather_ptr, gather_stride, row, owned, inputs)
    if group_block == 0:
        tl.store(targets_ptr + row, tl.where(live, target, -1).to(tl.int32), mask=valid)

    dead = named & (live == 0)
    end_col = tl.where(tl.max(dead.to(tl.int32), axis=0) > 0, n, 0)
    for first in range(group_block * CLEARED, end_col, programs_per_row * CLEARED):
        col = first + tl.arange(0, CLEARED)
        cleared = out_ptr + target[:, None] * n + col[None, :]
        zeros = tl.zeros((ROWS, CLEARED), out_ptr.dtype.element_ty)
        tl.store(cleared, zeros, mask=dead[:, None] & (col < n)[None, :])

    groups = group_block * GROUPS + tl.arange(0, GROUPS)
    cols = groups[:, None] * 128 + tl.arange(0, 128)[None, :]  # [GROUPS, 128]
    inside = live[:, None, None] & (cols < k)[None, :, :]
    x_places = source[:, None, None] * x_stride_row
    x_places += (cols.to(tl.int64) * x_stride_col)[None, :, :]
    x = tl.load(x_ptr + x_places, mask=inside, other=0.0).to(tl.float32)
    expert = find_group(index_ptr, row, experts + 1, STEPS)
    if static_ptr is not None:
        own = static_ptr + tl.minimum(expert, experts - 1).to(tl.int64) * static_stride
        of_row = tl.load(own, mask=valid, other=1.0)
        scale = tl.broadcast_to(of_row[:, None], (ROWS, GROUPS))
        spread = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, 128))
        code = quantize_tile_static(x, spread, data_ptr.dtype.element_ty, MAX, FORMAT)
    else:
        amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)  # [ROWS, GROUPS]
        if ONE_AMAX:
            amax_bits = tl.broadcast_to(tl.max(amax_bits, axis=1)[:, None], (ROWS, GROUPS))
        scale = _scale_of(amax_bits, MAX)
        code = _encode(_divide(x, scale[:, :, None]), data_ptr.dtype.element_ty, FORMAT)
    data_places = row.to(tl.int64)[:, None, None] * k + cols[None, :, :]
    tl.store(data_ptr + data_places, code, mask=inside)
    before = tl.maximum(expert - 1, 0)
    start = tl.where(expert > 0, tl.load(index_ptr + before, mask=valid, other=0), 0)
    column = row - start + (start + 3 * expert + 3) // 4 * 4  # `first_scale`
    scale_places = groups.to(tl.int64)[None, :] * scale_pitch + column[:, None]
    wanted = live[:, None] & (groups < scale_groups)[None, :]
    tl.store(scale_ptr + scale_places, scale, mask=wanted)


@triton.jit
def _write_entries(
    first,
    most_tiles,
    bounds_ptr,
    tile_bounds_ptr,
    table_ptr,
    experts,
    STEPS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """ENTRIES entries of the table; the first program writes how many there are, too."""
    tile = first + tl.arange(0, ENTRIES)
    group = find_group(tile_bounds_ptr, tile, experts + 1, STEPS)
    exists = (tile < most_tiles) & (group < experts)
    expert = tl.minimum(group, experts - 1)
    before = tl.maximum(expert - 1, 0)
    start = tl.where(expert > 0, tl.load(bounds_ptr + before), 0)
    tiles_before = tl.where(expert > 0, tl.load(tile_bounds_ptr + before), 0)
    entry = table_ptr + 4 + tile * 4
    tl.store(entry, expert, mask=exists)
    tl.store(entry + 1, start, mask=exists)
    tl.store(entry + 2, tl.load(bounds_ptr + expert), mask=exists)
    tl.store(entry + 3, tiles_before, mask=exists)
    if first == 0:
        tl.store(table_ptr, tl.load(tile_bounds_ptr + experts - 1))
