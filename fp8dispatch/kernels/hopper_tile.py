"""Parts of the Hopper GEMMs: tiles in order, chains of products with promotion, the epilogue.

The design and what was measured are in `hopper_gemm`; these are the device functions that its
persistent kernel and `hopper_split` share.
"""

from __future__ import annotations

from fp8dispatch.kernels.gluon_compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    thread_barrier,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def tile_place(tile, tiles_m, TILES_N: gl.constexpr, GROUP_M: gl.constexpr, EVEN: gl.constexpr):
    """Row and column of a tile: GROUP_M tile rows are walked together, column by column."""
    per_group: gl.constexpr = GROUP_M * TILES_N
    group = tile // per_group
    place = tile - group * per_group
    if EVEN:
        row = group * GROUP_M + place % GROUP_M
        col = place // GROUP_M
    else:
        rows = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        col = place // rows
        row = group * GROUP_M + place - col * rows
    return row, col


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def next_scale(place, block, SCALE_K: gl.constexpr):
    """Place of the scale of `block` of K, where `place` is that of the block before."""
    if SCALE_K == 128:
        place += 1
    else:
        place += (gl.to_tensor(block) % (SCALE_K // 128) == 0).to(gl.int32)
    return place


@gluon.jit
def lane_zero(m, WG: gl.constexpr):
    """A zero that differs by lane as far as the assembler can tell."""
    lane = gl.inline_asm_elementwise(
        "mov.u32 $0, %laneid; // $1", "=r,r", [gl.to_tensor(WG)], gl.int32, True, 1
    )
    return lane * (m < 0).to(gl.int32)


@gluon.jit
def _store_piece(c, c_s, piece, row, col, WG: gl.constexpr, i: gl.constexpr, BUFFERS: gl.constexpr):
    """64 rows and 128 bytes of columns: registers, shared memory, TMA store; buffers take turns."""
    tma_store_wait(BUFFERS - 1)
    thread_barrier()
    buffer = c_s.index(
        gl.inline_asm_elementwise(
            "mov.u32 $0, $1;",
            "=r,r",
            [gl.to_tensor(WG * BUFFERS + i % BUFFERS)],
            gl.int32,
            False,
            1,
        )
    )
    buffer.store(piece)
    fence_async_shared()
    thread_barrier()
    tma_store(c, [row, col], buffer)


@gluon.jit
def _halves(x, ROWS: gl.constexpr, COLS: gl.constexpr):
    return gl.split(gl.permute(gl.reshape(x, [ROWS, 2, COLS // 2]), [0, 2, 1]))


@gluon.jit
def finish_tile(
    acc,
    c,
    c_s,
    b_scale,
    bias,
    m,
    row,
    col,
    N: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    MASKED: gl.constexpr,
    WG: gl.constexpr,
    first: gl.constexpr,
    BUFFERS: gl.constexpr,
    L: gl.constexpr,
):
    """Column scales of the row-wise recipe, bias, one rounding, the store of 64x128 or 64x64."""
    WIDTH: gl.constexpr = acc.shape[1]
    if (not BLOCKWISE) or (bias is not None) or MASKED:
        cols = col + gl.arange(0, WIDTH, gl.SliceLayout(0, L))
    if not BLOCKWISE:
        scale = gl.load(b_scale + cols * SCALE_STRIDE, mask=cols < N, other=0.0)
        acc = acc * gl.expand_dims(scale, 0)
    if bias is not None:
        added = gl.load(bias + cols, mask=cols < N, other=0.0).to(gl.float32)
        acc = acc + gl.expand_dims(added, 0)
    if MASKED:
        rows = row + gl.arange(0, 64, gl.SliceLayout(1, L))
        places = c + gl.expand_dims(rows.to(gl.int64) * N, 1) + gl.expand_dims(cols, 0)
        valid = gl.expand_dims(rows < m, 1) & gl.expand_dims(cols < N, 0)
        gl.store(places, acc.to(c.dtype.element_ty), mask=valid)
    elif WIDTH == 64:
        if c.dtype == gl.float32:
            x, y = _halves(acc, 64, 64)
            _store_piece(c, c_s, x, row, col, WG, first, BUFFERS)
            _store_piece(c, c_s, y, row, col + 32, WG, first + 1, BUFFERS)
        else:
            _store_piece(c, c_s, acc.to(c.dtype), row, col, WG, first, BUFFERS)
    else:
        x, y = _halves(acc.to(c.dtype), 64, 128)
        if c.dtype == gl.float32:
            x0, x1 = _halves(x, 64, 64)
            y0, y1 = _halves(y, 64, 64)
            _store_piece(c, c_s, x0, row, col, WG, 2 * first, BUFFERS)
            _store_piece(c, c_s, x1, row, col + 32, WG, 2 * first + 1, BUFFERS)
            _store_piece(c, c_s, y0, row, col + 64, WG, 2 * first + 2, BUFFERS)
            _store_piece(c, c_s, y1, row, col + 96, WG, 2 * first + 3, BUFFERS)
        else:
            _store_piece(c, c_s, x, row, col, WG, first, BUFFERS)
            _store_piece(c, c_s, y, row, col + 64, WG, first + 1, BUFFERS)


@gluon.jit
def _square_body(
    acc,
    p,
    q,
    a_s,
    b_s,
    s_s,
    full,
    empty,
    scale_place,
    next_place,
    b_scale,
    stage,
    phase,
    never,
    done,
    scales,
    first_block,
    COUNT: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_K: gl.constexpr,
    WG: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    L: gl.constexpr,
):
    """UNROLL blocks of K, straight-line: the next product is issued before the last is promoted."""
    RL: gl.constexpr = gl.SliceLayout(1, L)
    a = a_s.index(stage).slice(WG * 64, 64, dim=0)
    p = warpgroup_mma(a, b_s.index(stage).permute((1, 0)), p, use_acc=never, is_async=True)
    f = s_s.index(stage).reshape([128]).slice(WG * 64, 64, dim=0).load(RL)
    if BLOCKWISE:
        f = f * b_scale
    for u in gl.static_range(UNROLL):
        previous = stage
        stage, phase = advance(stage, phase, STAGES)
        if BLOCKWISE:
            following = next_scale(scale_place, first_block + done + u + 1, SCALE_K)
            scale_place = gl.where(done + u + 1 < scales, following, next_place)
            b_scale = gl.load(scale_place)
        if u + 1 < UNROLL:
            mbarrier.wait(full.index(stage), phase)
            a = a_s.index(stage).slice(WG * 64, 64, dim=0)
            b = b_s.index(stage).permute((1, 0))
            if u % 2 == 0:
                q = warpgroup_mma(a, b, q, use_acc=never, is_async=True)
                p = warpgroup_mma_wait(1, deps=[p])
            else:
                p = warpgroup_mma(a, b, p, use_acc=never, is_async=True)
                q = warpgroup_mma_wait(1, deps=[q])
        else:
            mbarrier.wait(full.index(stage), phase, pred=done + u + 1 < COUNT)
            if u % 2 == 0:
                p = warpgroup_mma_wait(0, deps=[p])
            else:
                q = warpgroup_mma_wait(0, deps=[q])
        mbarrier.arrive(empty.index(previous))
        if u % 2 == 0:
            acc += p * gl.expand_dims(f, 1)
        else:
            acc += q * gl.expand_dims(f, 1)
        if u + 1 < UNROLL:
            acc = warpgroup_mma_wait(1, deps=[acc])
            f = s_s.index(stage).reshape([128]).slice(WG * 64, 64, dim=0).load(RL)
            if BLOCKWISE:
                f = f * b_scale
    return acc, p, q, scale_place, b_scale, stage, phase


@gluon.jit
def square_tile(
    a_s,
    b_s,
    s_s,
    full,
    empty,
    scale_place,
    next_place,
    b_scale,
    stage,
    phase,
    never,
    scales,
    first_block,
    COUNT: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_K: gl.constexpr,
    WG: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    L: gl.constexpr,
):
    """COUNT blocks of K of 64 rows from `first_block` on; the first `scales` have a scale of B."""
    WIDTH: gl.constexpr = b_s.shape[1]
    acc = gl.zeros([64, WIDTH], gl.float32, L)
    p = gl.zeros([64, WIDTH], gl.float32, L)
    q = gl.zeros([64, WIDTH], gl.float32, L)
    mbarrier.wait(full.index(stage), phase)
    for body in range(COUNT // UNROLL):
        acc, p, q, scale_place, b_scale, stage, phase = _square_body(
            acc, p, q, a_s, b_s, s_s, full, empty, scale_place, next_place, b_scale,
            stage, phase, never, body * UNROLL, scales, first_block,
            COUNT, BLOCKWISE, SCALE_K, WG, STAGES, UNROLL, L,
        )  # fmt: skip
    if COUNT % UNROLL > 0:
        acc, p, q, scale_place, b_scale, stage, phase = _square_body(
            acc, p, q, a_s, b_s, s_s, full, empty, scale_place, next_place, b_scale,
            stage, phase, never, (COUNT // UNROLL) * UNROLL, scales, first_block,
            COUNT, BLOCKWISE, SCALE_K, WG, STAGES, COUNT % UNROLL, L,
        )  # fmt: skip
    return acc, scale_place, b_scale, stage, phase
