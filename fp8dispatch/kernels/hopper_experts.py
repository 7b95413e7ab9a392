"""Scaled FP8 GEMM over rows sorted by expert, for Hopper (capability 9.0) in Gluon: prefill.

    out[targets[s]] = sum over blocks of 128 of K (a[s] @ b[e].T) * a_scale * b_scale[e] + bias[e]

The "wide" kernel of `hopper_gemm` with experts: 128x256 tiles, two consumers of 64 rows each, a
producer that brings the operands by TMA, 4 stages, one persistent program per SM. Its arithmetic,
its main loop and what the compiler must not do to it are described there. What is added:

* The launch depends on shapes alone. How many tiles there are, and which expert and rows each
  has, stands in a table on the device (`hopper_experts_rows`, which finds experts by a search over
  cumulative tiles); a program takes tiles until the number that it read is reached. Nothing waits
  for the host, so a captured graph follows the routing; uneven routing costs no more than tiles.
* The tiles of an expert follow each other, GROUP_M rows of tiles together, column by column: its
  weights are read from memory once for each GROUP_M * 128 of its rows.
* Rows are not padded. A tile begins at any row of `a`; behind its expert's last row it multiplies
  rows of the next one, which are not stored. Scales of an expert begin at a multiple of 16 bytes
  (`first_scale`): rows are their innermost coordinate, where TMA takes nothing else (an H200 stops
  with an illegal instruction). A consumer whose 64 rows all lie behind the end only hands the
  stages back.
* b is one tensor map over [E, N, K], so columns from N on are zeros and experts may lie apart.
* Rows leave by ordinary stores, since each may go anywhere: pieces of 64 rows and 128 bytes pass
  through shared memory, so that eight lanes write a whole line of a row, 16 bytes each. Rows of no
  expert are not touched here; their zeros are written where the rows are prepared.

Between two tiles a consumer reads the next one's entry, which its producer has read before and so
has brought near, and asks for its first scales before it stores. Rows of the output are asked for
before the main loop. None of these loads goes through a uniform register (`lane_zero`); `_opaque`
keeps addresses out of the main loop's registers.

Measured (one H200, Triton 3.6, bench/results/h200-experts.json), quantisation included: 8192 rows
of 8 experts of 4096 x 7168 1063 TFLOP/s (the portable kernel 717, DeepGEMM 672, torch's bf16 812),
of 7168 x 2048 1042 (692, 433, 784). With eight rows of an expert it is level with the portable
kernel, reading the weights; with fewer that one is faster, for its tiles are smaller: nothing here
splits K or has fewer rows than 128, and below 64 half of the tensor cores' turns are skipped.

Tried in the compiler: reading the next entry before the main loop keeps four registers more there,
and bias with single-element stores then spills with Triton 3.6; so do pieces of 64 columns with
single-element stores, whose addresses are computed ahead of all loops.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fp8dispatch.kernels.hopper_experts_tile import (
    find_tile,
    look_up,
    place_in_expert,
    store_half,
)
from fp8dispatch.kernels.hopper_tile import advance, lane_zero


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
    table,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    TILES_N: gl.constexpr = (N + 255) // 256
    tiles = gl.load(table) * TILES_N
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, start, end, place = find_tile(table, tile, tiles, TILES_N)
        row, tile_n = place_in_expert(place, start, end, TILES_N, GROUP_M)
        scales = row - start + (start + 3 * expert + 3) // 4 * 4  # `first_scale`
        for k in range((K + 127) // 128):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 128 * 128 + 256 * 128 + 128 * 4)
            tma_load(a, [row, k * 128], bar, a_s.index(stage))
            tma_load(b, [expert, tile_n * 256, k * 128], bar, b_s.index(stage))
            tma_load(a_scale, [k if BLOCKWISE else 0, scales], bar, s_s.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _consume(
    out,
    a_s,
    b_s,
    s_s,
    c_s,
    full,
    empty,
    b_scale,
    bias,
    targets,
    table,
    rows,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    VECTOR: gl.constexpr,
    WG: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The tiles of one consumer, 64 rows of each."""
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    RL: gl.constexpr = gl.SliceLayout(1, L)
    LINES: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [4, 1], [1, 0])
    base: gl.constexpr = WG * 64
    COUNT: gl.constexpr = (K + 127) // 128
    stage = 0
    phase = 0
    never = rows < 0
    # What is loaded from these addresses stays out of uniform registers, which would be waited for.
    zero = lane_zero(rows, WG)
    tiles = gl.load(table) * ((N + 255) // 256)
    first = gl.program_id(0)
    expert, end, row, tile_n, place, right, scale0, scale1 = look_up(
        table, b_scale, zero, first, tiles, N, K, BLOCKWISE, GROUP_M
    )
    for tile in range(first, tiles, gl.num_programs(0)):
        following = tile + gl.num_programs(0)
        col = tile_n * 256
        own = row + base + gl.arange(0, 64, gl.SliceLayout(1, LINES))
        target = gl.load(targets + own, mask=own < end, other=-1)  # arrives later
        if row + base < end:
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
                    place += more.to(gl.int32)
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
            done = expert
            # The entry is near, for the producer was here before; the scales arrive meanwhile.
            expert, end, row, tile_n, place, right, scale0, scale1 = look_up(
                table, b_scale, zero, following, tiles, N, K, BLOCKWISE, GROUP_M
            )
            store_half(
                acc0, out, c_s, b_scale, bias, done, target, col,
                N, BLOCKWISE, SCALE_STRIDE, WG, LINES,
            )  # fmt: skip
            store_half(
                acc1, out, c_s, b_scale, bias, done, target, col + 128,
                N, BLOCKWISE, SCALE_STRIDE, WG, LINES,
            )  # fmt: skip
        else:  # the expert's rows end in the other consumer's half
            for _ in range(COUNT):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage))
                stage, phase = advance(stage, phase, STAGES)
            expert, end, row, tile_n, place, right, scale0, scale1 = look_up(
                table, b_scale, zero, following, tiles, N, K, BLOCKWISE, GROUP_M
            )


@gluon.jit(do_not_specialize=["rows"])
def hopper_experts(
    a,  # [S, K] in boxes [128, 128]: rows sorted by expert
    b,  # [E, N, K] in boxes [1, 256, 128]
    a_scale,  # [ceil(K / 128) or 1, columns] in boxes [1, 128]
    out,  # [rows of the output, N], contiguous
    b_scale,  # [E, ceil(N / 128), ceil(K / 128)], [E, N], or [E] with SCALE_STRIDE 0
    bias,  # [E, N] or None
    targets,  # int32 [S]: row of the output, -1 for a row that is not multiplied
    table,  # int32 [1 + tile rows, 4]: their number; of each: expert, its start, end, and tiles
    rows,  # S
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    VECTOR: gl.constexpr,  # elements of one store
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Tiles of 128x256; a persistent program takes tile after tile."""
    DTYPE: gl.constexpr = out.dtype.element_ty
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    a_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], a.layout)
    b_s = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES, 256, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    b_boxes = reinterpret(b_s, gl.float8e4nv, [STAGES, 1, 256, 128], b.layout)
    s_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], a_scale.layout)
    # Single elements are stored from pieces half as wide: fewer addresses at a time.
    COLS: gl.constexpr = 32 if VECTOR == 1 else 1024 // BITS
    c_s = gl.allocate_shared_memory(
        DTYPE, [4, 64, COLS], gl.NVMMASharedLayout(COLS * BITS // 8, BITS, 2)
    )
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
                    out, a_s, b_s, s_s, c_s, full, empty, b_scale, bias, targets, table, rows,
                    N, K, BLOCKWISE, SCALE_STRIDE, VECTOR, 0, STAGES, GROUP_M,
                ),
            ),
            (
                _consume,
                (
                    out, a_s, b_s, s_s, c_s, full, empty, b_scale, bias, targets, table, rows,
                    N, K, BLOCKWISE, SCALE_STRIDE, VECTOR, 1, STAGES, GROUP_M,
                ),
            ),
            (
                _produce,
                (
                    a, b, a_scale, a_s, b_boxes, s_s, full, empty, table,
                    N, K, BLOCKWISE, STAGES, GROUP_M,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
