"""The tiles that a size may be timed with beside the choice of `gemm_config`.

All of them give the same bits. A partial product still covers `block_k` of K, is still promoted by
the same fused multiply-add in the same order, and is still made by the same instructions: on Hopper
64 rows and more are multiplied by a warpgroup and fewer by a warp, so no tile crosses from one to
the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from fp8dispatch.kernels.gemm_config import BYTES_IN_FLIGHT, GemmConfig, stages_that_fit
from fp8dispatch.kernels.launch import DeviceLimits
from fp8dispatch.kernels.tile import MOST_STAGES, ROWS, Tile

MOST = 7
"""Tiles beside the default: each costs a compilation and its share of the time of a tuning."""

_WARPGROUP_ROWS = 64


def tile_of(config: GemmConfig) -> Tile:
    """The part of a configuration that may be chosen freely."""
    return Tile(
        config.block_m,
        config.block_n,
        config.num_warps,
        config.num_stages,
        config.programs_per_sm,
        config.group_m,
    )


def candidates(
    config: GemmConfig, block_size: tuple[int, int] | None, upcast: bool, limits: DeviceLimits
) -> tuple[Tile, ...]:
    """Up to `MOST` other tiles for the size that `choose_config` has chosen `config` for.

    Args:
        config: the choice.
        block_size: block of the weight scale, or None for one scale per weight row.
        upcast: the kernel decodes FP8 to float16 itself.
        limits: the device.
    """
    found: dict[Tile, None] = {}
    shapes = _many_rows(config) if config.programs_per_sm else _few_rows(config)
    for rows, columns, warps, programs, wanted, group in shapes:
        fitting = stages_that_fit((rows + columns) * config.block_k, programs, upcast, limits)
        stages = min(wanted, MOST_STAGES, fitting)
        if stages < 2 or rows not in ROWS:
            continue
        tile = Tile(rows, columns, warps, stages, programs, group)
        if tile != tile_of(config) and applies(tile, config, block_size, upcast, limits):
            found[tile] = None
    return tuple(found)[:MOST]


_Shape = tuple[int, int, int, int, int, int]
"""Rows, columns, warps, programs on each SM, stages wanted, rows of a group."""


def _few_rows(config: GemmConfig) -> Iterator[_Shape]:
    """Bound by reading the weight: more bytes in flight, or more programs."""
    rows, columns, warps, group = config.block_m, config.block_n, config.num_warps, config.group_m
    for width in (32, 64, 128):
        yield rows, width, warps, 0, max(4, BYTES_IN_FLIGHT // ((rows + width) * 128)), group
    yield rows, 128, 8, 0, 4, group
    yield rows, columns, warps, 0, config.num_stages // 2, group
    yield rows, columns, warps, 0, config.num_stages + 2, group
    yield rows // 2, columns, warps, 0, MOST_STAGES, group


def _many_rows(config: GemmConfig) -> Iterator[_Shape]:
    """Bound by the tensor core: reuse against programs that take turns."""
    rows, columns, warps, group = config.block_m, config.block_n, config.num_warps, config.group_m
    yield 64, 128, warps, 2, 4, group
    yield 64, 64, warps, 2, 6, group
    yield 128, 128, 8, 1, 4, group
    yield 64, 256, 8, 1, 4, group
    yield 128, 64, warps, 2, 4, group
    yield rows, columns, warps, 2, config.num_stages - 1, group
    yield rows, columns, warps, 1, 6, group
    yield rows, columns, warps, 2, config.num_stages, 8


@functools.lru_cache(maxsize=8192)  # asked in calls of the host path
def with_tile(
    config: GemmConfig,
    tile: Tile,
    block_size: tuple[int, int] | None,
    upcast: bool,
    limits: DeviceLimits,
) -> GemmConfig:
    """The configuration with another tile, or as it is where that tile does not apply to it.

    A tile that was measured for one M is asked for at every M of its bucket, and for other layouts
    and formats of the operands, where the kernel may be another.
    """
    if not applies(tile, config, block_size, upcast, limits):
        return config
    return replace(
        config,
        block_m=tile.block_m,
        block_n=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        programs_per_sm=tile.programs_per_sm,
        group_m=tile.group_m,
    )


def applies(
    tile: Tile,
    config: GemmConfig,
    block_size: tuple[int, int] | None,
    upcast: bool,
    limits: DeviceLimits,
) -> bool:
    """Whether a tile can take the place of the one in `config`: same bits, and it fits."""
    rows, columns = tile.block_m, tile.block_n
    same_instructions = (rows < _WARPGROUP_ROWS) == (config.block_m < _WARPGROUP_ROWS)
    # `choose_config` never asks more of a thread than its share of a 64 x 128 tile.
    registers = rows * columns * config.num_warps <= 64 * 128 * tile.num_warps
    # Where a tile has one weight scale it keeps one: a vector of them costs registers and time.
    scale_rows = 0 if block_size is None else block_size[0]
    one_scale = scale_rows % columns == 0 or scale_rows % config.block_n != 0
    stage = (rows + columns) * config.block_k
    deepest = stages_that_fit(stage, tile.programs_per_sm, upcast, limits)
    return same_instructions and registers and one_scale and tile.num_stages <= deepest
