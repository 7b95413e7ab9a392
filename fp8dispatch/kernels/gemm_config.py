"""Which tile the scaled GEMM uses: a pure function of the problem and the device.

No autotuning. A first call must not stall, two runs must give the same bits, and a change of M may
recompile only where the tile class changes (M up to 16, 32, 64, and above). `gemm_tiles` puts a
tile that was measured on the user's own GPU in the place of this choice.

Evidence: one H200, M x N x K = 4096 x 7168 x 2048, block (128, 128), Triton 3.6. Descriptors, tile
64 x 128, 4 warps, 4 stages, two programs per SM, persistent: 856 TFLOP/s; 128 x 128 with 8 warps:
775; the same two with pointer loads: 702 and 611; 256 x 128: 647; warp specialisation: no change.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from fp8dispatch.kernels.launch import DeviceLimits, ceil_div
from fp8dispatch.kernels.tile import MOST_STAGES, USUAL_GROUP

BYTES_IN_FLIGHT = 65_536  # per program: covers about 1 us of latency at one SM's share of HBM
_SHARED_RESERVE = 4_096  # barriers, the reduction scratch, and what the driver keeps per program


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """One tile choice.

    Attributes:
        block_m: Rows of an output tile.
        block_n: Columns of an output tile.
        block_k: Columns of the operands that one partial product covers, at most 128.
        group_m: Tile rows that are walked together before moving along N, for reuse in L2.
        num_warps: Warps of a program.
        num_stages: Operand tiles in flight.
        programs_per_sm: Persistent programs on each SM, or 0 for one program per tile.
        descriptors: Load operands through TMA descriptors instead of pointers.
        flatten: Fuse the tile loop and the K loop, so that loads run ahead across tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    descriptors: bool
    flatten: bool = False


@functools.lru_cache(maxsize=8192)  # a call of the host path: a dozen microseconds otherwise
def choose_config(
    m: int,
    n: int,
    *,
    block_size: tuple[int, int] | None,
    upcast: bool,
    descriptors: bool,
    limits: DeviceLimits,
    experts: int = 1,
) -> GemmConfig:
    """Choose the tile of ``[M, K] x [N, K]``.

    Args:
        m: Rows of the output.
        n: Columns of the output.
        block_size: Block of the weight scale, or None for one scale per weight row.
        upcast: The kernel decodes FP8 to float16 itself.
        descriptors: Layout and device allow TMA loads (the tile may still need pointers).
        limits: The device.
        experts: Weights that the rows are spread over: the tile is that of one weight's share.

    Returns:
        The configuration. K plays no part: a longer K only lengthens the loop.
    """
    # Decoded operands are twice as wide and live in registers or shared memory a second time.
    block_k = chunk_of(None if block_size is None else block_size[1], 64 if upcast else 128, upcast)
    share = ceil_div(m, experts)
    small = share <= 64
    # Below 64 rows a taller tile multiplies zeros; 16 is the smallest the tensor core takes. From
    # 64 rows on a warpgroup instruction of 64 rows is used, and two small programs per SM beat one
    # large one, since one promotes partial sums while the other keeps the tensor core busy.
    block_m = 16 if share <= 16 else 32 if share <= 32 else 64
    tiles_m = max(ceil_div(m, block_m), min(m, experts))
    widths: tuple[int, ...] = (128, 64, 32) if small else (128, 64)
    if upcast and experts > 1 and not small:
        widths = (64,)  # with decoded operands the addresses of rows that lie anywhere would spill
    block_n = _block_n(tiles_m, n, widths, limits)
    if block_size is not None:
        block_n = _fit_scale_block(block_n, block_size[0])

    # One warpgroup holds a 64 x 128 tile where the tensor core reads shared memory (Hopper, and
    # Blackwell of the data centre). Where operands pass through registers it spills: two groups.
    masked = block_size is not None and block_size[1] % block_k != 0
    wide_instruction = limits.capability[0] in (9, 10) and not upcast and not masked

    # A weight-bound call wants bytes in flight, not reuse; a compute-bound one wants two programs.
    stage = (block_m + block_n) * block_k
    wanted = min(MOST_STAGES, max(4, BYTES_IN_FLIGHT // stage)) if small else 4
    programs = 0 if small else 2
    return GemmConfig(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        group_m=USUAL_GROUP,
        num_warps=4 if small or wide_instruction else 8,
        num_stages=max(2, min(wanted, stages_that_fit(stage, programs, upcast, limits))),
        programs_per_sm=programs,
        # Up to 64 rows descriptors cost more to set up than they save (-11 to -17 % at M <= 16).
        # A chunk must tile the scale block, because TMA masks only at the tensor's edge.
        descriptors=descriptors and not small and not masked,
    )


def stages_that_fit(stage: int, programs: int, upcast: bool, limits: DeviceLimits) -> int:
    """Stages of so many bytes that a program has shared memory for, beside others on its SM.

    Args:
        stage: Bytes of a tile of both operands.
        programs: Persistent programs on each SM, or 0 for one program per tile.
        upcast: The kernel decodes FP8 to float16 itself.
        limits: The device.
    """
    decoded = 2 * stage if upcast else 0
    room = limits.shared_memory // max(1, programs) - _SHARED_RESERVE - decoded
    if room < 3 * stage:  # cards with 99 KiB: one program per SM rather than a pipeline of two
        room = limits.shared_memory - _SHARED_RESERVE - decoded
    return room // stage


def fit_wide(config: GemmConfig, itemsize: int, limits: DeviceLimits) -> GemmConfig:
    """The same tile with as many stages as fit where `a` has `itemsize` bytes an element.

    The tile of `b` exists twice: as bytes in each stage, and once in the dtype of `a`. Four bytes
    are multiplied on the CUDA cores, out of registers, which hold a quarter of the tile.
    """
    if itemsize == 4:
        columns, depth = min(config.block_n, 64), min(config.block_k, 32)
        config = replace(config, block_n=columns, block_k=depth, num_warps=8)
    stage = (itemsize * config.block_m + config.block_n) * config.block_k
    room = limits.shared_memory - _SHARED_RESERVE - itemsize * config.block_n * config.block_k
    return replace(config, num_stages=max(1, min(config.num_stages, room // stage)))


def chunk_of(block_k: int | None, largest: int, upcast: bool) -> int:
    """Return the power of two that covers a scale block of K in chunks with the fewest zeros.

    Args:
        block_k: Columns of a scale block; None where a scale covers all of K.
        largest: The longest chunk allowed.
        upcast: The dot is in float16, whose K may be 16; an FP8 dot needs 32.

    Returns:
        The chunk; of equal choices the longest.
    """
    if block_k is None:
        return largest
    chunks = [
        size for size in (128, 64, 32, 16) if size <= largest and size >= (16 if upcast else 32)
    ]
    return min(chunks, key=lambda size: (ceil_div(block_k, size) * size, -size))


def _block_n(tiles_m: int, n: int, widths: tuple[int, ...], limits: DeviceLimits) -> int:
    """The widest tile that still gives every SM one."""
    for width in widths:
        if tiles_m * ceil_div(n, width) >= limits.multiprocessors:
            return width
    return widths[-1]


def _fit_scale_block(block_n: int, scale_block_n: int) -> int:
    """Narrow the tile where that makes its weight scale one number instead of a vector."""
    for width in (block_n, block_n // 2, block_n // 4):
        if width >= 32 and scale_block_n % width == 0:
            return width
    return block_n
