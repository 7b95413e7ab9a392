"""In which shape `hopper_grad_input` runs: a pure function of sizes and the number of SMs.

No autotuning: two runs give the same bits. The costs are those of an H200 as far as the choices
that were measured there depend on them; a split that is too fine is the costliest mistake.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fp8dispatch.kernels.launch import ceil_div

STEP = 64
"""Rows of W in one stage."""

_WORKSPACE = 1 << 24  # float32 elements of a split at most: 64 MiB

# Cycles of a program, for the choice of a split.
_CYCLES_OF_STEP = {128: 1100, 64: 950, 32: 950, 16: 950}  # below 128 rows by the bytes of W
_CYCLES_OF_TILE = 1500  # first copies and conversion, stores
_BYTES_A_CYCLE = 24  # of partial sums to and from L2


class GradConfig(NamedTuple):
    """One shape of the kernel; a tuple, so that it is a cheap key.

    Attributes:
        block_m: rows of dX for each of two consumers: 16, 32, 64 or 128.
        tall: consumers are one above the other (tiles of ``2 * block_m`` x 128), else side by side
            (``block_m`` x 256).
        stages: steps of 64 of N in flight.
        split: programs that share the N of one tile.
        group_m: tile rows that are walked together before moving along K.
        buffers: pieces of output that a consumer may have on their way.
        ahead: a consumer converts the next operands while its own products run, else while those
            of the other consumer do.
    """

    block_m: int
    tall: bool
    stages: int
    split: int = 1
    group_m: int = 16
    buffers: int = 2
    ahead: bool = False

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of dX in one tile."""
        return (2 * self.block_m, 128) if self.tall else (self.block_m, 256)

    def tiles(self, m: int, k: int) -> int:
        """Tiles of an [m, k] output."""
        rows, columns = self.tile
        return ceil_div(m, rows) * ceil_div(k, columns)

    def workspace(self, m: int, k: int) -> tuple[int, int]:
        """float32 elements and counters that a call needs; none without a split."""
        if self.split == 1:
            return 0, 0
        tiles, (rows, columns) = self.tiles(m, k), self.tile
        return self.split * tiles * rows * columns, 2 * tiles


WIDE = GradConfig(128, tall=False, stages=6)
TALL = GradConfig(128, tall=True, stages=5, group_m=8, buffers=1)
FEW = {
    16: GradConfig(16, tall=False, stages=11),
    32: GradConfig(32, tall=False, stages=9),
    64: GradConfig(64, tall=False, stages=8),
}
"""By rows of dX, for at most as many."""


@functools.lru_cache(maxsize=8192)
def choose_grad_config(m: int, n: int, k: int, multiprocessors: int) -> GradConfig:
    """The shape for ``dX [M, K] = dY [M, N] @ W [N, K]``.

    Args:
        m, n, k: sizes, at least 1.
        multiprocessors: SMs of the device.
    """
    shapes = next(([FEW[rows]] for rows in (16, 32, 64) if m <= rows), [WIDE, TALL, FEW[64]])
    found = [_with_split(shape, m, n, k, multiprocessors) for shape in shapes]
    return min(found, key=lambda one: _cycles(one, m, n, k, multiprocessors))


def _with_split(shape: GradConfig, m: int, n: int, k: int, multiprocessors: int) -> GradConfig:
    """The split that takes the fewest cycles; of equal ones the smallest."""
    most = max(1, min(32, ceil_div(n, STEP) // 4))
    choices = [shape._replace(split=split) for split in range(1, most + 1)]
    fitting = [one for one in choices if one.workspace(m, k)[0] <= _WORKSPACE]
    return min(fitting, key=lambda one: _cycles(one, m, n, k, multiprocessors))


def _cycles(config: GradConfig, m: int, n: int, k: int, multiprocessors: int) -> int:
    """About how long the longest program takes."""
    waves = ceil_div(config.tiles(m, k) * config.split, multiprocessors)
    steps = ceil_div(ceil_div(n, STEP), config.split)
    cycles = waves * (steps * _CYCLES_OF_STEP[config.block_m] + _CYCLES_OF_TILE)
    if config.split > 1:
        rows, columns = config.tile
        partial = rows * columns * 4 // _BYTES_A_CYCLE
        cycles += (waves + config.split) * partial
    return cycles
