"""Scaled FP8 GEMM for Hopper (capability 9.0) in Gluon: up to 64 rows, exact accumulation.

    out = sum over blocks of 128 of K ( (x @ w.T) * x_scale * w_scale ) + bias

Bound by reading the weight once, so everything serves bytes in flight and a short start:

* The operands are swapped: the weight is the tall side of the WGMMA, the rows of x (padded with
  zeros to 16, 32 or 64) its N. With 8 rows Triton would fall back to older instructions, which
  convert to fp16 first.
* Both operands are seen as [K / 128, rows, 128], so that one TMA box brings CHUNK blocks of K; a
  ring of STAGES blocks is STAGES / CHUNK boxes, each with an mbarrier. An expect and a copy each
  cost a barrier of the program, so few big boxes beat many small ones. A K that is no multiple of
  128 cannot be seen so: there each block is a copy of its own, in rows of 16 bytes (FLAT).
* All scales of the program's share of K, multiplied, go to shared memory once: no global load in
  the loop. Blocks beyond K are zeros by TMA, with scale zero.
* Two products are in flight inside a box: block j is promoted while block j + 1 multiplies. A
  partial sum covers 128 of K and starts from zero.
* Few tiles: SPLIT programs share one, each with a contiguous range of K. Each writes its float32
  partial and counts itself in; the last to arrive adds them up in the order of K, so the sum does
  not depend on who is last, and clears the counter. No program waits for another.
* PROGRAMMATIC: the first copies of the weight are on their way before the kernel waits for the one
  in front of it, which is our quantiser; `grid_dependency` says why no write to the weight can be
  overtaken. All else comes after the wait, and the next kernel in the stream never starts early.

Limits, measured on the prototype of this kernel (one H200, Triton 3.6; weights never in L2; N x K
= 7168x2048, 4096x7168, 24576x1536, 7168x16384, 57344x8192): with 16 rows 5.9, 10.3, 11.3, 30.9 and
111 us, where a kernel that only reads the weight takes 5.0, 8.5, 10.3, 27.9 and 105; 1 to 8 rows
cost what 16 cost; 64 rows 7.2, 12.8, 13.3, 33.8 and 119 to 125, since every tile of 64 weight rows
reads all of x again through L2. On small shapes a launch takes 1.1 us and the first data 1 us more:
starting early gave 1.3, 1.6, 1.3, 0.6 and 1.3 us with 16 rows.

Tried on the prototype, with the outcome (same shapes): plain ``tl.dot`` with two blocks a turn 7.0,
10.7, 11.6, 32.8, 115 (the scales' latency in each turn); x through registers 7.5, 11.8, 12.4, 33.6,
118; not swapped 10.6, 16.7, -, 91, -; quantising x inside 8.0, 12.2, 12.9, 34.2, 121 (every tile
does it again); CUDA cores with one row 6.4, 11.7, 14.0, 33.5, 115, with two 8.3, 19.4, 20.1, 66,
239; a prefetch of the weight into L2 1.3 to 3.6 us slower; a second kernel for the sum 0.5 us
slower; split where 60 or more tiles exist slower (4096x7168: 10.3 whole, 10.9 by 2, 12.4 by 4).
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
from fp8dispatch.kernels.grid_dependency import wait_for_prerequisites


@gluon.jit
def _fetch_weight(
    w,
    w_s,
    w_boxes,
    bars,
    slot,
    first_block,
    first_row,
    pred,
    CHUNK: gl.constexpr,
    FLAT: gl.constexpr,
    BYTES: gl.constexpr,
):
    """CHUNK blocks of K of the weight into a slot of the ring, which expects both operands."""
    bar = bars.index(slot)
    mbarrier.expect(bar, BYTES, pred=pred)
    if FLAT:
        for j in gl.static_range(CHUNK):
            place = [first_row, (first_block + j) * 128]
            tma_load(w, place, bar, w_s.index(slot * CHUNK + j), pred=pred)
    else:
        tma_load(w, [first_block, first_row, 0], bar, w_boxes.index(slot), pred=pred)


@gluon.jit
def _fetch_rows(
    x,
    x_s,
    x_boxes,
    bars,
    slot,
    first_block,
    pred,
    CHUNK: gl.constexpr,
    FLAT: gl.constexpr,
):
    """The same blocks of the activations."""
    bar = bars.index(slot)
    if FLAT:
        for j in gl.static_range(CHUNK):
            place = [0, (first_block + j) * 128]
            tma_load(x, place, bar, x_s.index(slot * CHUNK + j), pred=pred)
    else:
        tma_load(x, [first_block, 0, 0], bar, x_boxes.index(slot), pred=pred)


@gluon.jit
def _multiply(w_s, x_s, place, zero):
    return warpgroup_mma(
        w_s.index(place), x_s.index(place).permute((1, 0)), zero, use_acc=False, is_async=True
    )


@gluon.jit(do_not_specialize=["m", "x_scale_stride_m", "x_scale_stride_k"])
def hopper_decode(
    w,  # [K / 128, N, 128] in boxes [CHUNK, BLOCK_N, 128]; FLAT: [N, K] in boxes [BLOCK_N, 128]
    x,  # [K / 128, M, 128] in boxes [CHUNK, BLOCK_M, 128]; FLAT: [M, K] in boxes [BLOCK_M, 128]
    x_scale,
    w_scale,  # [ceil(N / SCALE_N), ceil(K / SCALE_K)], or [N] with stride SCALE_STRIDE
    bias,  # [N] or None
    out,  # [M, N] contiguous
    partials,  # float32 [SPLIT, M, N]; any pointer when SPLIT is 1
    counters,  # int32 [tiles], zero before and after
    m,
    x_scale_stride_m,
    x_scale_stride_k,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_N: gl.constexpr,
    SCALE_K: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    FLAT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    PROGRAMMATIC: gl.constexpr,
):
    """BLOCK_N rows of the weight (64 or 128) against all rows of x, over a share of K."""
    BLOCKS_K: gl.constexpr = (K + 127) // 128
    SCALE_COLS: gl.constexpr = (K + SCALE_K - 1) // SCALE_K
    TURNS: gl.constexpr = ((BLOCKS_K + SPLIT - 1) // SPLIT + CHUNK - 1) // CHUNK
    COUNT: gl.constexpr = TURNS * CHUNK
    SLAB: gl.constexpr = 1 << (COUNT - 1).bit_length()
    SLOTS: gl.constexpr = STAGES // CHUNK
    WARPS: gl.constexpr = gl.num_warps()
    BYTES: gl.constexpr = CHUNK * (BLOCK_N + BLOCK_M) * 128
    # Scales are gathered in pieces of at most 64 registers a thread.
    PIECE: gl.constexpr = min(SLAB, 64 * 32 * WARPS // BLOCK_M)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 32])
    COLS: gl.constexpr = gl.SliceLayout(0, ACC)
    GATHER: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [WARPS, 1], [1, 0])
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLANE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tile = gl.program_id(0)
    part = gl.program_id(1)
    first_block = part * COUNT
    first_row = tile * BLOCK_N
    w_s = gl.allocate_shared_memory(w.dtype, [STAGES, BLOCK_N, 128], OPERAND)
    x_s = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, 128], OPERAND)
    w_boxes = w_s
    x_boxes = x_s
    if not FLAT:
        w_boxes = reinterpret(w_s, w.dtype, [SLOTS, CHUNK, BLOCK_N, 128], w.layout)
        x_boxes = reinterpret(x_s, x.dtype, [SLOTS, CHUNK, BLOCK_M, 128], x.layout)
    scales = gl.allocate_shared_memory(gl.float32, [SLAB, BLOCK_M], ROW)
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    thread_barrier()
    for i in gl.static_range(SLOTS):
        if i < TURNS:
            block = first_block + i * CHUNK
            _fetch_weight(w, w_s, w_boxes, bars, i, block, first_row, True, CHUNK, FLAT, BYTES)
            if not PROGRAMMATIC:
                _fetch_rows(x, x_s, x_boxes, bars, i, block, True, CHUNK, FLAT)
    if PROGRAMMATIC:
        wait_for_prerequisites()
        for i in gl.static_range(SLOTS):
            if i < TURNS:
                block = first_block + i * CHUNK
                _fetch_rows(x, x_s, x_boxes, bars, i, block, True, CHUNK, FLAT)

    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(0, GATHER))
    plane = reinterpret(scales, gl.float32, [SLAB, BLOCK_M], PLANE)
    for i in gl.static_range(SLAB // PIECE):
        block = first_block + i * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, GATHER))
        places = gl.expand_dims(rows, 0) * x_scale_stride_m.to(gl.int64)
        group = block // (SCALE_K // 128)
        places += gl.expand_dims(group, 1) * x_scale_stride_k.to(gl.int64)
        valid = gl.expand_dims(block < BLOCKS_K, 1) & gl.expand_dims(rows < m, 0)
        product = gl.load(x_scale + places, mask=valid, other=0.0)
        if BLOCKWISE:
            of_weight = w_scale + (first_row // SCALE_N) * SCALE_COLS + group
            product *= gl.expand_dims(gl.load(of_weight, mask=block < BLOCKS_K, other=0.0), 1)
        plane.slice(i * PIECE, PIECE, dim=0).store(product)
    thread_barrier()

    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    for turn in range(TURNS):
        slot = turn % SLOTS
        place = slot * CHUNK
        mbarrier.wait(bars.index(slot), (turn // SLOTS) & 1)
        d = _multiply(w_s, x_s, place, zero)
        for j in gl.static_range(1, CHUNK):
            e = _multiply(w_s, x_s, place + j, zero)
            d = warpgroup_mma_wait(1, deps=[d])
            acc += d * gl.expand_dims(scales.index(turn * CHUNK + (j - 1)).load(COLS), 0)
            d = e
        d = warpgroup_mma_wait(0, deps=[d])
        if SLOTS < TURNS:
            thread_barrier()
            next_block = first_block + (turn + SLOTS) * CHUNK
            more = turn + SLOTS < TURNS
            _fetch_weight(
                w, w_s, w_boxes, bars, slot, next_block, first_row, more, CHUNK, FLAT, BYTES
            )
            _fetch_rows(x, x_s, x_boxes, bars, slot, next_block, more, CHUNK, FLAT)
        acc += d * gl.expand_dims(scales.index(turn * CHUNK + (CHUNK - 1)).load(COLS), 0)

    n = first_row + gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
    row = gl.arange(0, BLOCK_M, COLS)
    places = gl.expand_dims(n, 1) + gl.expand_dims(row.to(gl.int64) * N, 0)
    valid = gl.expand_dims(n < N, 1) & gl.expand_dims(row < m, 0)
    if SPLIT == 1:
        _write(acc, w_scale, bias, out, n, places, valid, N, BLOCKWISE, SCALE_STRIDE)
    else:
        stride = m.to(gl.int64) * N
        gl.store(partials + part * stride + places, acc, mask=valid)
        thread_barrier()
        arrived = gl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            thread_barrier()
            acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
            for share in range(SPLIT):
                partial = partials + share * stride + places
                acc += gl.load(partial, mask=valid, other=0.0, cache_modifier=".cg")
            gl.store(counters + tile, 0)  # for the next launch
            _write(acc, w_scale, bias, out, n, places, valid, N, BLOCKWISE, SCALE_STRIDE)


@gluon.jit
def _write(
    acc,
    w_scale,
    bias,
    out,
    n,
    places,
    valid,
    N: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
):
    """Weight scales of the row-wise recipe, bias, one rounding, and the masked store."""
    if not BLOCKWISE:
        scale = gl.load(w_scale + n * SCALE_STRIDE, mask=n < N, other=0.0)
        acc = acc * gl.expand_dims(scale, 1)
    if bias is not None:
        added = gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)
        acc = acc + gl.expand_dims(added, 1)
    gl.store(out + places, acc.to(out.dtype.element_ty), mask=valid)
