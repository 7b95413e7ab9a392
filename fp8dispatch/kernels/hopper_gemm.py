"""Scaled FP8 GEMM for Hopper (capability 9.0) in Gluon: more than 64 rows, exact accumulation.

    out = sum over blocks of 128 of K ( (a @ b.T) * a_scale * b_scale ) + bias

Three kinds, all warp-specialised: two consumers of four warps hold 64 rows of a 128-row tile each,
one producer warp brings the operands and the activations' scales by TMA. A stage is handed over
with two mbarriers, ``full`` (one arrival and the bytes) and ``empty`` (one arrival per consumer).
Each 128 of K is one chain of WGMMA into a partial sum of its own, which is then promoted with one
fused multiply-add per element, ``acc += partial * (a_scale[row] * b_scale)``.

"wide": 128x256 tiles, 4 stages, one persistent program per SM. A consumer keeps its 64x256 result
as two halves (128 registers) and a single 64x128 partial sum (64), 223 registers in all. It
multiplies with B's left half, promotes, multiplies with the right half, promotes; the tensor cores
stay busy because the other consumer's chain runs meanwhile. So everything but the 64 multiply-adds
is kept out of the gap between two chains: the wait for the next stage runs under the second chain,
and a stage is released only after the next chain is issued.

"square": 128x128 tiles, 5 stages; for few tiles half as many columns, 128x64 and 7 stages
("narrow"). Two partial sums: the next chain is issued before the last one is promoted, in
straight-line bodies of UNROLL blocks.

"split": "square" with K divided over SPLIT programs of a tile, for the fewest tiles. Each writes
its partial tile to a workspace that stays in L2 and counts itself in; the last one to arrive adds
them up in a fixed order (of two, the other's to its own: addition commutes), so the result does not
depend on who is last. No program waits for another: any order of dispatch makes progress.

Blocks of the weight's scale have sides that are multiples of 128 (SCALE_N, SCALE_K), so that one
number serves a partial sum; with a longer SCALE_K a scale serves several blocks of K. The weight is
e4m3 or e5m2: the instruction mixes them.

Edges: TMA fills what lies beyond M, N or K with zeros on both operands and clips stores at M and N.
Scales of rows beyond M are zeros too. K needs rows of 16 bytes, no more: the last block of K may be
short, and a split past the end of K multiplies zeros. Outputs whose rows are not multiples of 16
bytes are written by masked stores from registers. All offsets into a result or operand are 64-bit
or TMA coordinates. M is an ordinary argument, N and K are constants of the compiled kernel.

What it takes for the compiler to leave this alone (each found in the assembly):

* The partial sum is overwritten in place: ``use_acc`` is a run-time False. With a constant False,
  or zeros, ptxas renames the registers, overlaps both halves and spills 604 bytes.
* ``warpgroup_mma_wait(deps=[acc])`` after a promotion is an order fence: LLVM sinks the
  multiply-adds below later inline assembly otherwise.
* B's scale is one number; loaded from a uniform address it would move to a uniform register at once
  and stop the warp for the load's latency. `lane_zero` makes the address differ by lane.
* Epilogue buffers are indexed through an opaque value, or their addresses live in the main loop.
* A chain in flight over a loop's back edge whose result is read in the next turn makes ptxas
  serialise every WGMMA (its warning C7514); so bodies end with a wait for all chains.

What limits it, measured on the prototype of these kernels (one H200, Triton 3.6, 700 W, M, N, K =
4096, 4096, 7168): 265k cycles, as many as DeepGEMM, tensor pipe 90 % busy, 94 % without promotion;
the clock falls to 1.54 GHz under load, so a percent of pipe buys less than a percent of time. Not
L2 (1.42 GB), not shared memory (66 %), not HBM. Below K = 2048 the fixed cost of a tile shows.

Tried on the prototype, with the outcome: 256x128 tiles with 3 stages 2 to 5 % slower; "square" best
in pipe use (91 %) but a third more traffic from L2 costs clock (1.51 GHz); strict turns between the
consumers 4 % more cycles; 64x64 partial sums in pairs no gain, shared memory at 83 %; A from
registers 10 % more cycles; A's scales by plain loads 5 % slower; 3 stages with 4 store buffers 2 to
4 % slower; stream-K over 112 tiles 78 us against 60, since programs that share a tile of B drift
apart and B comes twice from HBM.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fp8dispatch.kernels.hopper_tile import (
    advance,
    finish_tile,
    lane_zero,
    next_scale,
    square_tile,
    tile_place,
)


@gluon.jit
def _produce(
    a,
    b,
    a_scale,
    a_s,
    b_s,
    s_s,
    full,
    empty,
    m,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EVEN: gl.constexpr,
):
    tiles_m = gl.cdiv(m, 128)
    TILES_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: gl.constexpr = (K + 127) // 128
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles_m * TILES_N, gl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, tiles_m, TILES_N, GROUP_M, EVEN)
        for k in range(BLOCKS_K):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 128 * 128 + BLOCK_N * 128 + 128 * 4)
            tma_load(a, [tile_m * 128, k * 128], bar, a_s.index(stage))
            tma_load(b, [tile_n * BLOCK_N, k * 128], bar, b_s.index(stage))
            group = k // (SCALE_K // 128) if BLOCKWISE else 0
            tma_load(a_scale, [group, tile_m * 128], bar, s_s.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _to_right_half(tile_n, N: gl.constexpr, SCALE_N: gl.constexpr, SCALE_COLS: gl.constexpr):
    """Steps from the scale of a wide tile's left half to that of its right one, if it has one."""
    first = tile_n * 256
    if SCALE_N == 128:
        steps = gl.where(first + 128 < N, SCALE_COLS, 0)
    else:
        rows = (first + 128) // SCALE_N - first // SCALE_N
        steps = gl.where(first + 128 < N, rows * SCALE_COLS, 0)
    return steps


@gluon.jit
def _consume(
    c,
    a_s,
    b_s,
    s_s,
    c_s,
    full,
    empty,
    b_scale,
    bias,
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
    GROUP_M: gl.constexpr,
    EVEN: gl.constexpr,
    BUFFERS: gl.constexpr,
    UNROLL: gl.constexpr,
):
    """The tiles of one consumer, 64 rows of each."""
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64 if BLOCK_N == 64 else 128, 32]
    )
    RL: gl.constexpr = gl.SliceLayout(1, L)
    base: gl.constexpr = WG * 64
    tiles_m = gl.cdiv(m, 128)
    TILES_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    SCALE_COLS: gl.constexpr = (K + SCALE_K - 1) // SCALE_K
    COUNT: gl.constexpr = (K + 127) // 128
    stage = 0
    phase = 0
    never = m < 0
    tiles = tiles_m * TILES_N
    first = gl.program_id(0)
    tile_m, tile_n = tile_place(first, tiles_m, TILES_N, GROUP_M, EVEN)
    scales = b_scale + lane_zero(m, WG)
    place = scales
    right = 0
    if BLOCKWISE:
        place = scales + tile_n * BLOCK_N // SCALE_N * SCALE_COLS
        if BLOCK_N == 256:
            right = _to_right_half(tile_n, N, SCALE_N, SCALE_COLS)
    scale0 = gl.load(place)
    scale1 = scale0
    if BLOCKWISE and BLOCK_N == 256:
        scale1 = gl.load(place + right)
    for tile in range(first, tiles, gl.num_programs(0)):
        row = tile_m * 128 + base
        col = tile_n * BLOCK_N
        # the next tile's place and first scales are known before this one ends
        tile_m, tile_n = tile_place(
            gl.minimum(tile + gl.num_programs(0), tiles - 1), tiles_m, TILES_N, GROUP_M, EVEN
        )
        next_place = scales
        if BLOCKWISE:
            next_place = scales + tile_n * BLOCK_N // SCALE_N * SCALE_COLS
        if BLOCK_N == 256:
            next_right = _to_right_half(tile_n, N, SCALE_N, SCALE_COLS)
            acc0 = gl.zeros([64, 128], gl.float32, L)
            acc1 = gl.zeros([64, 128], gl.float32, L)
            p = gl.zeros([64, 128], gl.float32, L)
            # "previous = stage" would not be seen as carried by the loop: the same value on entry
            previous = stage + 0
            mbarrier.wait(full.index(stage), phase)
            for k in range(COUNT):
                a = a_s.index(stage).slice(base, 64, dim=0)
                b = b_s.index(stage)
                left_b = b.slice(0, 128, dim=0).permute((1, 0))
                p = warpgroup_mma(a, left_b, p, use_acc=never, is_async=True)
                mbarrier.arrive(empty.index(previous), pred=k > 0)
                s = s_s.index(stage).reshape([128]).slice(base, 64, dim=0).load(RL)
                more = k + 1 < COUNT
                f0 = s
                f1 = s
                if BLOCKWISE:
                    f0 = s * scale0
                    f1 = s * scale1
                    place = gl.where(more, next_scale(place, k + 1, SCALE_K), next_place)
                    right = gl.where(more, right, next_right)
                    scale0 = gl.load(place)
                    scale1 = gl.load(place + right)
                p = warpgroup_mma_wait(0, deps=[p])
                acc0 += p * gl.expand_dims(f0, 1)
                acc0 = warpgroup_mma_wait(0, deps=[acc0])  # before p is overwritten
                right_b = b.slice(128, 128, dim=0).permute((1, 0))
                p = warpgroup_mma(a, right_b, p, use_acc=never, is_async=True)
                previous = stage
                stage, phase = advance(stage, phase, STAGES)
                mbarrier.wait(full.index(stage), phase, pred=more)  # under the running chain
                p = warpgroup_mma_wait(0, deps=[p])
                acc1 += p * gl.expand_dims(f1, 1)
                acc1 = warpgroup_mma_wait(0, deps=[acc1])
            mbarrier.arrive(empty.index(previous))
            finish_tile(
                acc0, c, c_s, b_scale, bias, m, row, col,
                N, BLOCKWISE, SCALE_STRIDE, MASKED, WG, 0, BUFFERS, L,
            )  # fmt: skip
            finish_tile(
                acc1, c, c_s, b_scale, bias, m, row, col + 128,
                N, BLOCKWISE, SCALE_STRIDE, MASKED, WG, 2, BUFFERS, L,
            )  # fmt: skip
        else:
            acc, place, scale0, stage, phase = square_tile(
                a_s, b_s, s_s, full, empty, place, next_place, scale0, stage, phase, never, COUNT,
                0, COUNT, BLOCKWISE, SCALE_K, WG, STAGES, UNROLL, L,
            )  # fmt: skip
            finish_tile(
                acc, c, c_s, b_scale, bias, m, row, col,
                N, BLOCKWISE, SCALE_STRIDE, MASKED, WG, 0, BUFFERS, L,
            )  # fmt: skip
    if not MASKED:
        tma_store_wait(0)


@gluon.jit(do_not_specialize=["m"])
def hopper_gemm(
    a,  # [M, K] in boxes [128, 128]
    b,  # [N, K] in boxes [BLOCK_N, 128]
    a_scale,  # [ceil(K / SCALE_K) or 1, M] in boxes [1, 128]
    c,  # [M, N] in boxes [64, 128 bytes], or a pointer when MASKED
    b_scale,  # [ceil(N / SCALE_N), ceil(K / SCALE_K)], or [N] with stride SCALE_STRIDE
    bias,  # [N] or None
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
    GROUP_M: gl.constexpr,
    EVEN: gl.constexpr,
    BUFFERS: gl.constexpr,
    UNROLL: gl.constexpr,
):
    """ "wide" with BLOCK_N = 256, "square" with 128 or 64; a program takes tile after tile."""
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
                _consume,
                (
                    c, a_s, b_s, s_s, c_s, full, empty, b_scale, bias, m,
                    N, K, BLOCKWISE, SCALE_N, SCALE_K, SCALE_STRIDE, MASKED, 0,
                    BLOCK_N, STAGES, GROUP_M, EVEN, BUFFERS, UNROLL,
                ),
            ),
            (
                _consume,
                (
                    c, a_s, b_s, s_s, c_s, full, empty, b_scale, bias, m,
                    N, K, BLOCKWISE, SCALE_N, SCALE_K, SCALE_STRIDE, MASKED, 1,
                    BLOCK_N, STAGES, GROUP_M, EVEN, BUFFERS, UNROLL,
                ),
            ),
            (
                _produce,
                (
                    a, b, a_scale, a_s, b_s, s_s, full, empty, m,
                    N, K, BLOCKWISE, SCALE_K, BLOCK_N, STAGES, GROUP_M, EVEN,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
