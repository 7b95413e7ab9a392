"""Which rows belong to which expert, found out on the device: nothing waits, no value is trusted.

Rows sorted by expert are cut into tiles of BLOCK_M rows that never cross from one expert to the
next. How many tiles there are depends on values, so a launch is sized by the bound that shapes
give, `tile_bound`, and each program finds its expert by a binary search over the cumulative number
of tiles. Rows behind the last expert form one more group, whose tiles write zeros.

    bounds[g]      end of the rows of group g, g = 0 .. E (group E is the rest, ending at `rows`)
    tile_bounds[g] number of tiles of the groups 0 .. g

A short list of expert ids is sorted by counting, for each row, the rows that come before it: one
launch, stable, T^2 comparisons (67 million for 8192 rows, spread over 64 programs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from fp8dispatch.kernels.launch import (
    FP_FUSION,
    Launch,
    ceil_div,
    next_power_of_2,
    on_device_of,
    plain_launch,
)

if TYPE_CHECKING:
    import torch

LONGEST_COUNTED = 8192
"""Rows up to which `sort_ids` is the way to sort; beyond, the square of them is too many."""

_QUERIES = 32
_CHUNK = 256


def tile_bound(rows: int, experts: int, block_m: int) -> int:
    """Most tiles that `rows` rows of `experts` experts, and the rest, can make."""
    return min(rows, (rows + (experts + 1) * (block_m - 1)) // block_m)


def sort_ids(expert_ids: torch.Tensor, order: torch.Tensor, ends: torch.Tensor) -> None:
    """Sort rows by their expert, stably; ids of no expert go last.

    Args:
        expert_ids: ``[T]``, any integer dtype and stride; T at most `LONGEST_COUNTED`.
        order: ``[T]`` int32 output: the row at each place of the sorted order.
        ends: ``[E]`` int32 output: inclusive cumulative ends.
    """
    rows, experts = expert_ids.shape[0], ends.shape[0]
    with on_device_of(expert_ids):
        _sort_kernel[(ceil_div(rows + experts, _QUERIES),)](
            expert_ids,
            order,
            ends,
            rows,
            experts,
            expert_ids.stride(0),
            QUERIES=_QUERIES,
            CHUNK=_CHUNK,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )


def schedule(
    offsets: torch.Tensor,
    rows: int,
    block_m: int,
    bounds: torch.Tensor,
    tile_bounds: torch.Tensor,
    launch: Launch = plain_launch,
) -> None:
    """Clamp the ends of the experts' rows and count their tiles.

    Args:
        offsets: ``[E]``, any integer dtype and stride: inclusive cumulative ends of any value.
        rows: number of sorted rows.
        block_m: rows of a tile.
        bounds: ``[E + 1]`` int32 output, rising, within 0 and `rows`; the last one is `rows`.
        tile_bounds: ``[E + 1]`` int32 output.
        launch: How the kernel is started.
    """
    experts = offsets.shape[0]
    arguments = (offsets, bounds, tile_bounds, rows, experts, offsets.stride(0))
    constants = {"BLOCK_M": block_m, "CHUNK": min(next_power_of_2(experts + 1), 1024)}
    with on_device_of(offsets):
        launch(_schedule_kernel, 1, arguments, constants, 4)


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["rows", "ids_stride"])
def _sort_kernel(
    ids_ptr,
    order_ptr,
    ends_ptr,
    rows,
    experts,
    ids_stride,
    QUERIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A query is a row, which asks for its place, or an expert, which asks for its end.

    Both count the rows with a smaller (expert, row): expert e asks for those below (e + 1, 0).
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    is_row = query < rows
    own = tl.load(ids_ptr + query.to(tl.int64) * ids_stride, mask=is_row, other=0).to(tl.int64)
    own = tl.where((own >= 0) & (own < experts), own, experts)
    own = tl.where(is_row, own, query.to(tl.int64) - rows + 1)
    place = tl.where(is_row, query, -1)
    before = tl.zeros((QUERIES,), tl.int32)
    for start in range(0, rows, CHUNK):
        other = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + other.to(tl.int64) * ids_stride, mask=other < rows, other=0)
        ids = ids.to(tl.int64)
        ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
        ids = tl.where(other < rows, ids, experts + 1)
        first = ids[None, :] < own[:, None]
        tie = (ids[None, :] == own[:, None]) & (other[None, :] < place[:, None])
        before += tl.sum((first | tie).to(tl.int32), axis=1)
    tl.store(order_ptr + before, query, mask=is_row)
    tl.store(ends_ptr + query - rows, before, mask=(query >= rows) & (query < rows + experts))


@triton.jit
def _clamped_end(offsets_ptr, stride, group, experts, rows):
    """Ends as the caller gives them, within 0 and `rows`; the rest ends at `rows`."""
    known = (group >= 0) & (group < experts)
    offset = tl.load(offsets_ptr + group.to(tl.int64) * stride, mask=known, other=0).to(tl.int64)
    end = tl.minimum(tl.maximum(offset, 0), rows).to(tl.int32)
    return tl.where(group >= experts, rows, end)


@triton.jit(do_not_specialize=["rows", "offsets_stride"])
def _schedule_kernel(
    offsets_ptr,
    bounds_ptr,
    tile_bounds_ptr,
    rows,
    experts,
    offsets_stride,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program; E + 1 groups in chunks, the largest end and the number of tiles carried on."""
    reached = rows * 0
    tiles = rows * 0
    for start in range(0, experts + 1, CHUNK):
        group = start + tl.arange(0, CHUNK)
        end = _clamped_end(offsets_ptr, offsets_stride, group, experts, rows)
        end = tl.maximum(tl.associative_scan(end, 0, _largest), reached)
        previous = _clamped_end(offsets_ptr, offsets_stride, group - 1, experts, rows)
        previous = tl.maximum(tl.associative_scan(previous, 0, _largest), reached)
        count = tl.where(group <= experts, tl.cdiv(end - previous, BLOCK_M), 0)
        tile_end = tl.cumsum(count, 0) + tiles
        tl.store(bounds_ptr + group, end, mask=group <= experts)
        tl.store(tile_bounds_ptr + group, tile_end, mask=group <= experts)
        reached = tl.max(end, axis=0)
        tiles = tl.max(tile_end, axis=0)


@triton.jit
def find_group(bounds_ptr, value, groups, STEPS: tl.constexpr):
    """The first group whose bound exceeds `value`, or `groups`; 2^STEPS must exceed `groups`."""
    low = value * 0
    high = low + groups
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        bound = tl.load(bounds_ptr + tl.minimum(middle, groups - 1))
        searching = low < high
        high = tl.where(searching & (bound > value), middle, high)
        low = tl.where(searching & (bound <= value), middle + 1, low)
    return low


@triton.jit
def find_tile(
    tile, bounds_ptr, tile_bounds_ptr, groups, STEPS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Group of a tile, its first row, and the end of its group's rows (0 where it has no group)."""
    group = find_group(tile_bounds_ptr, tile, groups, STEPS)
    known = tl.minimum(group, groups - 1)
    before = tl.maximum(known - 1, 0)
    first_row = tl.where(known > 0, tl.load(bounds_ptr + before), 0)
    first_tile = tl.where(known > 0, tl.load(tile_bounds_ptr + before), 0)
    end = tl.where(group < groups, tl.load(bounds_ptr + known), 0)
    return group, first_row + (tile - first_tile) * BLOCK_M, end


@triton.jit
def find_members(
    row, ids_ptr, ids_stride, rows, experts, MOST_ROWS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The rows that the program of one row takes: BLOCK_M of those with the same expert, or none.

    Rows of one expert are counted in order; the program of every BLOCK_M-th of them takes that one
    and those that follow. A row of no expert is taken by its own program.

    Returns:
        The expert (`experts` for none), the rows [BLOCK_M], and which of them exist.
    """
    other = tl.arange(0, MOST_ROWS)
    ids = tl.load(ids_ptr + other.to(tl.int64) * ids_stride, mask=other < rows, other=-1)
    ids = ids.to(tl.int64)
    own = tl.load(ids_ptr + row.to(tl.int64) * ids_stride).to(tl.int64)
    known = tl.where((own >= 0) & (own < experts), 1, 0)
    # Of no expert: compared by place instead, so that the row stands alone.
    alike = tl.where(known > 0, ids, other.to(tl.int64)) == tl.where(known > 0, own, row)
    member = tl.where(alike & (other < rows), 1, 0)
    rank = tl.cumsum(member, 0) - 1
    own_rank = tl.sum(tl.where(other < row, member, 0), axis=0)
    wanted = own_rank + tl.arange(0, BLOCK_M)
    wanted = tl.where(own_rank % BLOCK_M == 0, wanted, -1)
    taken = tl.where(rank[None, :] == wanted[:, None], member[None, :], 0)
    exists = tl.sum(taken, axis=1) > 0
    members = tl.sum(taken * other[None, :], axis=1)
    expert = tl.where(known > 0, own, experts).to(tl.int32)
    return expert, members, exists


@triton.jit
def map_rows(index_ptr, stride, rows, valid, size):
    """Where an index sends sorted rows, and which of them arrive; without one they stay."""
    if index_ptr is not None:
        place = tl.load(index_ptr + rows.to(tl.int64) * stride, mask=valid, other=-1).to(tl.int64)
    else:
        place = rows.to(tl.int64)
    arrives = valid & (place >= 0) & (place < size)
    return tl.where(arrives, place, 0), arrives
