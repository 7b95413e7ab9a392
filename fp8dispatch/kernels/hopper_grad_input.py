"""dX from the FP8 weight for Hopper (capability 9.0) in Gluon: ``dX = dY @ W``, W as it is stored.

    dX [M, K] = dY [M, N] @ round(float32(data [N, K]) * scale)

The weight is rounded to the dtype of dY (16 bits) and multiplied with a float32 accumulator over
all of N: the numbers of `dequantize` followed by a matmul. No element of it is written to memory,
not even to shared memory: it goes from bytes to an operand in registers.

How: the product is taken transposed, ``dX.T = W.T @ dY.T``. WGMMA reads its first operand from
registers, so W.T is dequantised right there, and dY [M, N] is the second one as it lies in memory.
A thread's part of W.T is pairs along N, whereas bytes that lie together are a pair along K. So the
codes are loaded as 16-bit units, transposed (``ldmatrix.trans``): 32 bits hold two rows of W by two
columns, and one permutation of bytes makes of them a pair along N for the even column and one for
the odd column. Even and odd columns are two products of their own, [64, BLOCK_M] each, over the
same dY; in the end a thread holds neighbouring columns of dX, which leave as 32 bits.

Warp-specialised: two consumers of four warps, and one producer warp that brings dY [rows, 64] and
codes [64, 128] by TMA into a ring of STAGES with two mbarriers each, ``full`` and ``empty``. A
consumer owns 128 columns of dX and BLOCK_M rows: "wide" tiles have consumers side by side (two
times 128 columns, the same dY), "tall" ones (TALL) one above the other (the same codes, which both
convert). One step is 64 of N. A consumer issues the products of a step, then waits for the next
stage, loads its codes and converts them while the products run, then waits for the products; in
what is left between two of its chains the tensor cores have the other consumer's. No chain is in
flight over a loop's back edge. The conversion is volatile assembly, so LLVM leaves it in front of
the wait; ptxas does so only where a branch stands between them, for which a barrier that is over is
waited for once more (AHEAD; without it a consumer converts while the other one multiplies).

Persistent: a program takes items (a tile, a part of N) in turns. With SPLIT, `split` parts of N
share a tile, where tiles are few or fill their last wave badly. Each part writes its float32 tile
to a workspace that stays in L2 and counts itself in; the last one to arrive adds them up in a fixed
order, so the result does not depend on who is last. No program waits for another.

Scales: one number for each 64 rows and 128 columns (SCALE_N a multiple of 64, SCALE_K of 128, 0
where a block reaches over everything), loaded one step ahead; or one for each row (ROWS), 64 of
which come with the codes.

Edges: TMA fills what lies beyond M, N or K with zeros and clips stores; the code zero is 0.0, and
the scale that it meets is one that exists. K is a multiple of 16 and N of 8, for strides of 16
bytes. Sizes are ordinary arguments: one compilation serves all weights of a recipe and dtype. All
offsets into operands and results are TMA coordinates.

Measured (one H200, Triton 3.6, 128x128 blocks, cold; the time of cuBLAS's bf16 ``dY @ W`` over its
own): 0.9 to 1.5 at M = 16, 0.5 to 0.8 at M = 256, 0.65 to 0.8 at M = 1024 and 4096. Converting
while the other consumer's products run beats converting ahead of them in 39 of 40 shapes.

What limits it is reasoned. A step of a wide tile with BLOCK_M = 128 is 1024 cycles of the tensor
cores for each SM; they read 64 bytes a cycle of shared memory for dY, and TMA, loads of codes add
48. The conversion takes about 3.5 instructions for an element, some 230 a warp and step, with two
warps of consumers on each scheduler. With BLOCK_M = 16 memory binds, if the ring is deep. A tile's
first conversion and its stores are not hidden, some hundred cycles each.
"""

from __future__ import annotations

from fp8dispatch.kernels.gluon_compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    thread_barrier,
    tma_load,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fp8dispatch.kernels.hopper_grad_tile import operands, place_of, scale_row, store_tile
from fp8dispatch.kernels.hopper_tile import advance, lane_zero


@gluon.jit
def _produce(
    grad,
    weight,
    row_scale,
    d_s,
    w_s,
    s_s,
    full,
    empty,
    m,
    n,
    k,
    split,
    ROWS: gl.constexpr,
    TILE_M: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    BLOCKS: gl.constexpr = TILE_K // 128
    BYTES: gl.constexpr = TILE_M * 128 + TILE_K * 64 + (256 if ROWS else 0)
    tiles_m = gl.cdiv(m, TILE_M)
    tiles_k = gl.cdiv(k, TILE_K)
    steps = gl.cdiv(n, 64)
    stage = 0
    phase = 1
    for item in range(gl.program_id(0), tiles_m * tiles_k * split, gl.num_programs(0)):
        _tile, _part, row, col, first, last = place_of(
            item, tiles_m, tiles_k, steps, split, GROUP_M
        )
        for step in range(first, last):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(BLOCKS):
                place = [step * 64, col * TILE_K + i * 128]
                tma_load(weight, place, bar, w_s.index(stage * BLOCKS + i))
            tma_load(grad, [row * TILE_M, step * 64], bar, d_s.index(stage))
            if ROWS:
                tma_load(row_scale, [0, step * 64], bar, s_s.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _consume(
    out,
    d_s,
    w_s,
    s_s,
    c_s,
    full,
    empty,
    scale,
    partials,
    counters,
    m,
    n,
    k,
    split,
    ROWS: gl.constexpr,
    SCALE_N: gl.constexpr,
    SCALE_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TALL: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP_M: gl.constexpr,
    BUFFERS: gl.constexpr,
    AHEAD: gl.constexpr,
    WG: gl.constexpr,
):
    """128 columns and BLOCK_M rows of each tile."""
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    DTYPE: gl.constexpr = out.dtype
    BLOCKS: gl.constexpr = 1 if TALL else 2
    OWN: gl.constexpr = 0 if TALL else WG  # which of the stage's blocks of codes
    TILE_M: gl.constexpr = 2 * BLOCK_M if TALL else BLOCK_M
    TILE_K: gl.constexpr = 128 if TALL else 256
    SPACE: gl.constexpr = 2 * 64 * BLOCK_M  # elements of a consumer's tile
    tiles_m = gl.cdiv(m, TILE_M)
    tiles_k = gl.cdiv(k, TILE_K)
    steps = gl.cdiv(n, 64)
    codes = reinterpret(w_s, gl.int16, [STAGES * BLOCKS, 64, 64], gl.NVMMASharedLayout(128, 16, 2))
    scales = scale + lane_zero(m, WG)
    scale_cols = 1
    if SCALE_K > 0:
        scale_cols = gl.cdiv(k, SCALE_K)
    stage = 0
    phase = 0
    for item in range(gl.program_id(0), tiles_m * tiles_k * split, gl.num_programs(0)):
        tile, part, tile_m, tile_k, first, last = place_of(
            item, tiles_m, tiles_k, steps, split, GROUP_M
        )
        row = tile_m * TILE_M + (WG * BLOCK_M if TALL else 0)
        col = tile_k * TILE_K + OWN * 128
        column = scales
        if SCALE_K > 0:
            column = scales + gl.minimum(col // SCALE_K, scale_cols - 1)
        number = 1.0
        following = 1.0
        if not ROWS:
            number = gl.load(column + scale_row(first, SCALE_N) * scale_cols)
            ahead = gl.minimum(first + 1, last - 1)
            following = gl.load(column + scale_row(ahead, SCALE_N) * scale_cols)
        even = gl.zeros([64, BLOCK_M], gl.float32, L)
        odd = gl.zeros([64, BLOCK_M], gl.float32, L)
        mbarrier.wait(full.index(stage), phase)
        a, b = operands(codes, s_s, stage, stage * BLOCKS + OWN, number, ROWS, DTYPE, A)
        for step in range(first, last):
            rows = d_s.index(stage)
            if TALL:
                rows = rows.slice(WG * BLOCK_M, BLOCK_M, dim=0)
            rows = rows.permute((1, 0))
            even = warpgroup_mma(a, rows, even, is_async=True)
            odd = warpgroup_mma(b, rows, odd, is_async=True)
            previous = stage
            stage, phase = advance(stage, phase, STAGES)
            number = following
            if not ROWS:
                ahead = gl.minimum(step + 2, last - 1)
                following = gl.load(column + scale_row(ahead, SCALE_N) * scale_cols)
            mbarrier.wait(full.index(stage), phase, pred=step + 1 < last)
            # After the last step this reads what is never used.
            a, b = operands(codes, s_s, stage, stage * BLOCKS + OWN, number, ROWS, DTYPE, A)
            if AHEAD:  # over already: a branch that the assembler moves no conversion across
                mbarrier.wait(full.index(stage), phase, pred=step + 1 < last)
            even, odd = warpgroup_mma_wait(0, deps=[even, odd])
            mbarrier.arrive(empty.index(previous))
        if not SPLIT:
            store_tile(even, odd, out, c_s, row, col, BLOCK_M, WG, BUFFERS)
        else:
            i = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, L)), 1)
            j = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, L)), 0)
            # a tile's partials lie side by side, one of both consumers for each part
            own = partials + tile.to(gl.int64) * (split * 2 * SPACE) + WG * SPACE
            places = own + i * BLOCK_M + j
            counter = counters + tile * 2 + WG
            gl.store(places + part * (2 * SPACE), even)
            gl.store(places + part * (2 * SPACE) + 64 * BLOCK_M, odd)
            thread_barrier()
            arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if arrived == split - 1:
                thread_barrier()
                even = gl.zeros([64, BLOCK_M], gl.float32, L)
                odd = gl.zeros([64, BLOCK_M], gl.float32, L)
                for share in range(split):
                    one = places + share * (2 * SPACE)
                    even += gl.load(one, cache_modifier=".cg")
                    odd += gl.load(one + 64 * BLOCK_M, cache_modifier=".cg")
                gl.store(counter, 0)  # for the next launch
                store_tile(even, odd, out, c_s, row, col, BLOCK_M, WG, BUFFERS)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["m", "n", "k", "split"])
def hopper_grad_input(
    grad,  # [M, N] in boxes [TILE_M, 64]
    weight,  # [N, K] in boxes [64, 128]
    out,  # [M, K] in boxes [min(BLOCK_M, 32), 128]
    row_scale,  # [1, N] in boxes [1, 64] where ROWS, else None
    scale,  # [ceil(N / SCALE_N), ceil(K / SCALE_K)]
    partials,  # float32 [tiles, split, 2, 2, 64, BLOCK_M]; any pointer without SPLIT
    counters,  # int32 [tiles, 2], zero before and after
    m,
    n,
    k,
    split,
    ROWS: gl.constexpr,
    SCALE_N: gl.constexpr,
    SCALE_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TALL: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP_M: gl.constexpr,
    BUFFERS: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """Tiles of BLOCK_M x 256, or with TALL of 2 * BLOCK_M x 128."""
    TILE_M: gl.constexpr = 2 * BLOCK_M if TALL else BLOCK_M
    TILE_K: gl.constexpr = 128 if TALL else 256
    PIECE: gl.constexpr = min(BLOCK_M, 32)
    d_s = gl.allocate_shared_memory(grad.dtype, [STAGES, TILE_M, 64], grad.layout)
    w_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * TILE_K // 128, 64, 128], weight.layout)
    s_s = w_s
    if ROWS:
        s_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], row_scale.layout)
    c_s = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS, PIECE, 128], out.layout)
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
                    out, d_s, w_s, s_s, c_s, full, empty, scale, partials, counters, m, n, k, split,
                    ROWS, SCALE_N, SCALE_K, BLOCK_M, TALL, STAGES, SPLIT, GROUP_M, BUFFERS,
                    AHEAD, 0,
                ),
            ),
            (
                _consume,
                (
                    out, d_s, w_s, s_s, c_s, full, empty, scale, partials, counters, m, n, k, split,
                    ROWS, SCALE_N, SCALE_K, BLOCK_M, TALL, STAGES, SPLIT, GROUP_M, BUFFERS,
                    AHEAD, 1,
                ),
            ),
            (
                _produce,
                (
                    grad, weight, row_scale, d_s, w_s, s_s, full, empty, m, n, k, split,
                    ROWS, TILE_M, TILE_K, STAGES, GROUP_M,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
