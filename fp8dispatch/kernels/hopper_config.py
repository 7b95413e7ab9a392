"""Which Hopper kernel runs a call, and in which shape: a pure function of sizes and the device.

No autotuning: two runs give the same bits. Up to 64 rows the decode kernel; above, the kind of
`hopper_gemm` that a model of its time, fitted to measurements, says is fastest: waves of tiles over
the SMs, and for few tiles half as many columns ("narrow") or a split of K.

The ring sizes of the decode kernel are the best of a sweep; the figures are in `hopper_decode`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, NamedTuple

from fp8dispatch.kernels.launch import ceil_div, next_power_of_2

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["wide", "square", "split", "decode"]

KINDS: tuple[Kind, ...] = ("wide", "square", "split", "decode")
DECODE_ROWS = 64
"""The decode kernel holds all rows of the activations in one tile."""

SHARED_MEMORY = 232_448
"""Bytes that one program may have on capability 9.0."""

# Microseconds on an H200, fitted to the times of every kind that fits at M = 128 to 1024 of sixteen
# weights, cold (bench/results/h200-hopper-kinds.json). A tile that stands alone on its SM takes
# less than a machine full of them, so these say which kind wins, not how long it runs.
_BLOCK_US = {256: 0.58, 128: 0.30, 64: 0.195}
"""A tile, by its columns, over 128 of K."""
_TILE_US = 0.5
_SPLIT_US = {64: tuple((parts, 0.5 + 1.1 * parts) for parts in (2, 3, 4))}
"""Writing the parts of a tile and adding them up, by its columns. Tiles of 128 columns take 3 for
each part, and nearly always more than narrow ones in fewer parts."""

_GROUP_M = 16
_BARRIERS = 2_048  # mbarriers and alignment, far more than they take
_SLAB = 65_536  # bytes of scales that a decode program keeps at most
_BUSY = 60  # programs with deep rings that keep the memory of an H200 busy


class HopperConfig(NamedTuple):
    """One kernel in one shape; a tuple, so that it is a cheap key.

    Attributes:
        kind: which kernel.
        block_m: rows of a tile: 128, or 16, 32 or 64 for decode.
        block_n: columns of a tile.
        stages: blocks of 128 of K in flight.
        split: programs that share the K of one tile.
        unroll: blocks of K in one straight-line body ("square", "split").
        even: the tile rows are a multiple of those walked together (no division at run time).
        chunk: blocks of K in one box (decode).
        warps: warps of a decode program; the others have eight and a producer.
    """

    kind: Kind
    block_m: int
    block_n: int
    stages: int
    split: int = 1
    unroll: int = 1
    even: bool = False
    chunk: int = 1
    warps: int = 4

    @property
    def group_m(self) -> int:
        """Tile rows that are walked together before moving along N."""
        return _GROUP_M

    def tiles(self, m: int, n: int) -> int:
        """Tiles of an [m, n] output."""
        return ceil_div(m, self.block_m) * ceil_div(n, self.block_n)

    def workspace(self, m: int, n: int) -> tuple[int, int]:
        """float32 elements and counters that a call needs; none without a split."""
        if self.split == 1:
            return 0, 0
        tiles = self.tiles(m, n)
        if self.kind == "decode":
            return self.split * m * n, tiles
        return self.split * tiles * self.block_m * self.block_n, 2 * tiles


@functools.lru_cache(maxsize=8192)
def choose_config(m: int, n: int, k: int, masked: bool, multiprocessors: int) -> HopperConfig:
    """The kernel for ``[M, K] x [N, K]``.

    Args:
        m, n, k: sizes, at least 1.
        masked: the output's rows are no multiple of 16 bytes, so TMA cannot store them.
        multiprocessors: SMs of the device.
    """
    if m <= DECODE_ROWS:
        return decode_config(m, n, k, multiprocessors)
    best = min(_candidates(m, n, k, masked, multiprocessors))  # of equals the earliest
    _, _, columns, split = best
    if columns == 256:
        return gemm_config("wide", m, k)
    kind: Kind = "square" if split == 1 else "split"
    return gemm_config(kind, m, k, split=split, masked=masked, narrow=columns == 64)


def _candidates(
    m: int, n: int, k: int, masked: bool, multiprocessors: int
) -> Iterator[tuple[float, int, int, int]]:
    """(microseconds beyond what every kernel takes, place, columns of a tile, split) of each."""
    rows, blocks = ceil_div(m, 128), ceil_div(k, 128)
    place = 0
    for columns, block_us in _BLOCK_US.items():
        if columns == 256 and masked:
            continue
        tiles = rows * ceil_div(n, columns)
        for split, split_us in ((1, 0.0), *_SPLIT_US.get(columns, ())):
            if split > 1 and (split * tiles > multiprocessors or blocks < 2 * split):
                continue
            waves = ceil_div(split * tiles, multiprocessors)
            place += 1
            yield (
                waves * (ceil_div(blocks, split) * block_us + _TILE_US) + split_us,
                place,
                columns,
                split,
            )


def gemm_config(
    kind: Kind, m: int, k: int, *, split: int = 1, masked: bool = False, narrow: bool = False
) -> HopperConfig:
    """The given kind of `hopper_gemm` or `hopper_split` for any number of rows.

    `narrow` halves the 128 columns of "square" and "split" tiles.
    """
    even = ceil_div(m, 128) % _GROUP_M == 0
    if kind == "wide":
        return HopperConfig("wide", 128, 256, stages=4, even=even)
    blocks = ceil_div(ceil_div(k, 128), split)
    # Bodies of five spill a register or two, and with Triton 3.6 so do two long bodies, one of them
    # for the tail, beside a long epilogue.
    whole = next((unroll for unroll in (8, 7, 6, 4) if blocks % unroll == 0), None)
    longest = 4 if masked or kind == "split" else 8
    unroll = whole or min(longest, blocks)
    columns, stages = (64, 7) if narrow else (128, 5)
    if kind == "square":
        return HopperConfig("square", 128, columns, stages=stages, unroll=unroll, even=even)
    return HopperConfig("split", 128, columns, stages=stages, split=split, unroll=unroll)


def decode_config(m: int, n: int, k: int, multiprocessors: int) -> HopperConfig:
    """The decode kernel for at most 64 rows."""
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    blocks = ceil_div(k, 128)
    tiles = ceil_div(n, 64)
    cols, warps, split = 64, 4, 1
    if tiles >= 5 * multiprocessors:  # several waves: a shallow ring, several programs on an SM
        chunk, stages = 2, 4
        if rows == 64:
            cols, warps = 128, 8
    elif tiles > multiprocessors:  # one to five waves: every program resident at once
        chunk, stages = (2, 6) if rows == 16 else (1, 4)
    else:
        split = _split_of(tiles, blocks)
        share = ceil_div(blocks, split)
        chunk = 4 if share % 4 == 0 and (rows == 16 or share >= 28) else 2 if share > 4 else 1
        if share < 28:
            stages = 16 if chunk == 4 else 8
        elif chunk == 4 and not (rows == 64 and share > 64):
            stages = {16: 20 if share <= 64 else 16, 32: 16, 64: 12}[rows]
        else:
            chunk, stages = 2, {16: 16, 32: 12, 64: 10}[rows]
    while _slab(blocks, split, chunk, rows) > _SLAB:
        split *= 2  # K is long: each program keeps the scales of its share
    share = ceil_div(ceil_div(blocks, split), chunk) * chunk
    room = SHARED_MEMORY - _BARRIERS - _slab(blocks, split, chunk, rows)
    stages = min(stages, share, room // ((cols + rows) * 128))
    return HopperConfig(
        "decode",
        rows,
        cols,
        stages=max(chunk, stages // chunk * chunk),
        split=split,
        chunk=chunk,
        warps=warps,
    )


def _split_of(tiles: int, blocks: int) -> int:
    """Parts of K, so that there are about 60 programs of at least four blocks."""
    if tiles >= _BUSY:
        return 1
    most = max(1, blocks // 4)
    wanted = min(ceil_div(_BUSY, tiles), most, 16)
    # A few parts more are better than parts of unequal length.
    whole = (split for split in range(wanted, min(2 * wanted, most) + 1) if blocks % split == 0)
    return next(whole, wanted)


def _slab(blocks: int, split: int, chunk: int, rows: int) -> int:
    share = ceil_div(ceil_div(blocks, split), chunk) * chunk
    return next_power_of_2(share) * rows * 4
