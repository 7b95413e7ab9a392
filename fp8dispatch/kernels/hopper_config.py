"""Which Hopper kernel runs a call, and in which shape: a pure function of sizes and the device.

No autotuning: two runs give the same bits. Up to 64 rows the decode kernel; above, of the kinds of
`hopper_gemm`, the one whose last wave of tiles wastes least, and a split of K where tiles are few.

Evidence: the prototypes on one H200, Triton 3.6 (TFLOP/s, M x N x K): "wide" 4096x4096x7168 1256,
4096x7168x2048 1217, 8192x8192x8192 1239; "square" 256x7168x16384 1005 (DeepGEMM 990), 512x4096x7168
1021; "split" by two 256x4096x7168 641. Decode: the figures in `hopper_decode`, whose ring sizes
here are the best of a sweep; a split of 3, 4 or more and sizes below 60 tiles were not timed.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

from fp8dispatch.kernels.launch import ceil_div, next_power_of_2

Kind = Literal["wide", "square", "split", "decode"]

KINDS: tuple[Kind, ...] = ("wide", "square", "split", "decode")
DECODE_ROWS = 64
"""The decode kernel holds all rows of the activations in one tile."""

SHARED_MEMORY = 232_448
"""Bytes that one program may have on capability 9.0."""

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
    rows = ceil_div(m, 128)
    square, wide = rows * ceil_div(n, 128), rows * ceil_div(n, 256)
    blocks = ceil_div(k, 128)
    for split, shortest in ((4, 8), (3, 8), (2, 2)):
        # Parts much shorter than the ring would spend their time on starting and adding up.
        if split * square <= multiprocessors and blocks >= shortest * split:
            return gemm_config("split", m, k, split=split)
    # Time in units of a 128x128 tile; "wide" is a few percent faster at equal work (L2 traffic).
    time_wide, time_square = (
        width * ceil_div(tiles, multiprocessors) for width, tiles in ((2, wide), (1, square))
    )
    if not masked and 100 * time_wide <= 104 * time_square:
        return gemm_config("wide", m, k)
    return gemm_config("square", m, k, masked=masked)


def gemm_config(
    kind: Kind, m: int, k: int, *, split: int = 1, masked: bool = False
) -> HopperConfig:
    """The given kind of `hopper_gemm` or `hopper_split` for any number of rows."""
    even = ceil_div(m, 128) % _GROUP_M == 0
    if kind == "wide":
        return HopperConfig("wide", 128, 256, stages=4, even=even)
    blocks = ceil_div(ceil_div(k, 128), split)
    # Bodies of five spill a register or two, and with Triton 3.6 so do two long bodies, one of them
    # for the tail, beside a long epilogue.
    whole = next((unroll for unroll in (8, 7, 6, 4) if blocks % unroll == 0), None)
    longest = 4 if masked or kind == "split" else 8
    unroll = whole or min(longest, blocks)
    if kind == "square":
        return HopperConfig("square", 128, 128, stages=5, unroll=unroll, even=even)
    return HopperConfig("split", 128, 128, stages=5, split=split, unroll=unroll)


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
