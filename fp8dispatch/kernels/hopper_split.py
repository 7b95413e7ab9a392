"""The "split" kind of the Hopper GEMM: K divided over the programs of a 128x128 or 128x64 tile.

For few tiles: a program for every SM although there are fewer tiles than SMs. The design is in
`hopper_gemm`. Each part writes its float32 tile to a workspace that stays in L2 and counts itself
in; the last to arrive adds them up in a fixed order. The workspace belongs to one stream.

Measured (one H200, Triton 3.6, cold, bench/results/h200-hopper-kinds.json): adding up costs about
1.1 us for each part of a 128x64 tile and 3 of a 128x128 tile, so only narrow tiles are split by
`hopper_config`.
"""

from __future__ import annotations

from fp8dispatch.kernels.gluon_compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    thread_barrier,
    tma_load,
    tma_store_wait,
)
from fp8dispatch.kernels.hopper_tile import advance, finish_tile, lane_zero, square_tile


@gluon.jit
def _produce_split(
    a,
    b,
    a_scale,
    a_s,
    b_s,
    s_s,
    full,
    empty,
    m,
    BLOCKWISE: gl.constexpr,
    SCALE_K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    COUNT: gl.constexpr,
):
    tiles_m = gl.cdiv(m, 128)
    tile = gl.program_id(0) // SPLIT
    first = gl.program_id(0) % SPLIT * COUNT
    tile_n = tile // tiles_m
    tile_m = tile - tile_n * tiles_m
    stage = 0
    phase = 1
    for k in range(COUNT):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        mbarrier.expect(bar, 128 * 128 + BLOCK_N * 128 + 128 * 4)
        tma_load(b, [tile_n * BLOCK_N, (first + k) * 128], bar, b_s.index(stage))
        tma_load(a, [tile_m * 128, (first + k) * 128], bar, a_s.index(stage))
        group = (first + k) // (SCALE_K // 128) if BLOCKWISE else 0
        tma_load(a_scale, [group, tile_m * 128], bar, s_s.index(stage))
        stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _consume_split(
    c,
    a_s,
    b_s,
    s_s,
    c_s,
    full,
    empty,
    b_scale,
    bias,
    partials,
    counters,
    m,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_N: gl.constexpr,
    SCALE_K: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    MASKED: gl.constexpr,
    WG: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    COUNT: gl.constexpr,
    BUFFERS: gl.constexpr,
    UNROLL: gl.constexpr,
):
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32]
    )
    BLOCKS_K: gl.constexpr = (K + 127) // 128
    SCALE_COLS: gl.constexpr = (K + SCALE_K - 1) // SCALE_K
    tiles_m = gl.cdiv(m, 128)
    tile = gl.program_id(0) // SPLIT
    part = gl.program_id(0) % SPLIT
    tile_n = tile // tiles_m
    tile_m = tile - tile_n * tiles_m
    place = b_scale + lane_zero(m, WG)
    if BLOCKWISE:
        place += tile_n * BLOCK_N // SCALE_N * SCALE_COLS
        place += gl.minimum(part * COUNT, BLOCKS_K - 1) // (SCALE_K // 128)
    acc, _place, _scale, _stage, _phase = square_tile(
        a_s, b_s, s_s, full, empty, place, place, gl.load(place), gl.to_tensor(0), gl.to_tensor(0),
        m < 0, BLOCKS_K - part * COUNT, part * COUNT, COUNT, BLOCKWISE, SCALE_K, WG, STAGES, UNROLL,
        L,
    )  # fmt: skip
    rows = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, L)), 1)
    cols = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(0, L)), 0)
    # a tile's partials lie side by side, one of 128xBLOCK_N for each part
    SIZE: gl.constexpr = 128 * BLOCK_N
    places = partials + (tile * SPLIT) * SIZE + WG * (SIZE // 2) + rows * BLOCK_N + cols
    counter = counters + tile * 2 + WG
    gl.store(places + part * SIZE, acc)
    thread_barrier()
    arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLIT - 1:
        thread_barrier()
        if SPLIT == 2:
            acc += gl.load(places + (1 - part) * SIZE, cache_modifier=".cg")
        else:
            acc = gl.zeros([64, BLOCK_N], gl.float32, L)
            for i in range(SPLIT):
                acc += gl.load(places + i * SIZE, cache_modifier=".cg")
        gl.store(counter, 0)  # for the next launch
        finish_tile(
            acc, c, c_s, b_scale, bias, m, tile_m * 128 + WG * 64, tile_n * BLOCK_N,
            N, BLOCKWISE, SCALE_STRIDE, MASKED, WG, 0, BUFFERS, L,
        )  # fmt: skip
        if not MASKED:
            tma_store_wait(0)


@gluon.jit(do_not_specialize=["m"])
def hopper_gemm_split(
    a,  # as in `hopper_gemm`
    b,
    a_scale,
    c,
    b_scale,
    bias,
    partials,  # float32 [tiles, SPLIT, 128, BLOCK_N]
    counters,  # int32 [tiles, 2], zero before and after
    m,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_N: gl.constexpr,
    SCALE_K: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    MASKED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    BUFFERS: gl.constexpr,
    UNROLL: gl.constexpr,
):
    """ "split": SPLIT programs a tile, each with its share of K."""
    COUNT: gl.constexpr = ((K + 127) // 128 + SPLIT - 1) // SPLIT
    a_s = gl.allocate_shared_memory(a.dtype, [STAGES, 128, 128], a.layout)
    b_s = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_N, 128], b.layout)
    s_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], a_scale.layout)
    c_s = a_s
    if not MASKED:
        COLS: gl.constexpr = 1024 // c.dtype.primitive_bitwidth
        c_s = gl.allocate_shared_memory(c.dtype, [2 * BUFFERS, 64, COLS], c.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    thread_barrier()
    gl.warp_specialize(
        [
            (
                _consume_split,
                (
                    c, a_s, b_s, s_s, c_s, full, empty, b_scale, bias, partials, counters, m,
                    N, K, BLOCKWISE, SCALE_N, SCALE_K, SCALE_STRIDE, MASKED, 0,
                    BLOCK_N, STAGES, SPLIT, COUNT, BUFFERS, UNROLL,
                ),
            ),
            (
                _consume_split,
                (
                    c, a_s, b_s, s_s, c_s, full, empty, b_scale, bias, partials, counters, m,
                    N, K, BLOCKWISE, SCALE_N, SCALE_K, SCALE_STRIDE, MASKED, 1,
                    BLOCK_N, STAGES, SPLIT, COUNT, BUFFERS, UNROLL,
                ),
            ),
            (
                _produce_split,
                (
                    a, b, a_scale, a_s, b_s, s_s, full, empty, m,
                    BLOCKWISE, SCALE_K, BLOCK_N, STAGES, SPLIT, COUNT,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
