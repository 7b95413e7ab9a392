"""Parts of `hopper_grad_input`: items in order, codes into operands, a tile of dX to memory.

The design is described there; these are the device functions that its partitions call.
"""

from __future__ import annotations

from fp8dispatch.kernels.gluon_compat import (
    fence_async_shared,
    gl,
    gluon,
    thread_barrier,
    tma_store,
    tma_store_wait,
)

# Two rows by two columns of codes in 32 bits: even column to $0, odd column to $1, times the scales
# of the rows. Decoding to fp16 is exact, the product is rounded to float32, then to 16 bits.
_TO_16_BITS = """
{
.reg .b32 t, u, v;
.reg .b16 a, b, c, d;
.reg .f32 e, f, g, h;
prmt.b32 t, $2, $2, 0x3120;
mov.b32 {a, b}, t;
cvt.rn.f16x2.e4m3x2 u, a;
cvt.rn.f16x2.e4m3x2 v, b;
mov.b32 {a, b}, u;
mov.b32 {c, d}, v;
cvt.f32.f16 e, a;
cvt.f32.f16 f, b;
cvt.f32.f16 g, c;
cvt.f32.f16 h, d;
mul.rn.f32 e, e, $3;
mul.rn.f32 f, f, $4;
mul.rn.f32 g, g, $3;
mul.rn.f32 h, h, $4;
cvt.rn.DTYPEx2.f32 $0, f, e;
cvt.rn.DTYPEx2.f32 $1, h, g;
}
"""
_TO_BF16 = gl.constexpr(_TO_16_BITS.replace("DTYPE", "bf16"))
_TO_FP16 = gl.constexpr(_TO_16_BITS.replace("DTYPE", "f16"))


@gluon.jit
def place_of(item, tiles_m, tiles_k, steps, split, GROUP_M: gl.constexpr):
    """Tile, part, row and column of the tile, and the part's steps of N from first to last."""
    tile = item // split
    part = item - tile * split
    group = tile // (GROUP_M * tiles_k)
    place = tile - group * (GROUP_M * tiles_k)
    rows = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    col = place // rows
    row = group * GROUP_M + place - col * rows
    return tile, part, row, col, part * steps // split, (part + 1) * steps // split


@gluon.jit
def scale_row(step, SCALE_N: gl.constexpr):
    row = step * 0
    if SCALE_N > 0:
        row = step // (SCALE_N // 64)
    return row


@gluon.jit
def _dequantized(codes, scale, DTYPE: gl.constexpr):
    """Two 16-bit tiles [64, 64] of W.T, the even columns of W and the odd ones.

    Args:
        codes: int16 [64, 64]: two columns of W at one row; a thread holds pairs of rows.
        scale: float32 [64, 64].
    """
    BF16: gl.constexpr = gl.bfloat16 == DTYPE
    if BF16:
        even, odd = gl.inline_asm_elementwise(
            _TO_BF16, "=r,=r,r,f,f", [codes, scale], [gl.bfloat16, gl.bfloat16], False, 2
        )
    else:
        even, odd = gl.inline_asm_elementwise(
            _TO_FP16, "=r,=r,r,f,f", [codes, scale], [gl.float16, gl.float16], False, 2
        )
    return even, odd


@gluon.jit
def operands(
    codes, s_s, stage, place, number, ROWS: gl.constexpr, DTYPE: gl.constexpr, A: gl.constexpr
):
    """The codes of a stage, dequantised."""
    loaded = codes.index(place).permute((1, 0)).load(A)
    if ROWS:
        row = s_s.index(stage).reshape([64]).load(gl.SliceLayout(0, A))
        scale, _ = gl.broadcast(gl.expand_dims(row, 0), loaded)
    else:
        scale = gl.full([64, 64], number, gl.float32, A)
    return _dequantized(loaded, scale, DTYPE)


@gluon.jit
def _halves(x, ROWS: gl.constexpr, COLS: gl.constexpr):
    return gl.split(gl.permute(gl.reshape(x, [ROWS, 2, COLS // 2]), [0, 2, 1]))


@gluon.jit
def _store_piece(
    even, odd, out, c_s, row, col, COLS: gl.constexpr, WG: gl.constexpr, BUFFERS: gl.constexpr,
    i: gl.constexpr,
):  # fmt: skip
    """COLS rows and 128 columns of dX: registers, shared memory, TMA store; buffers take turns."""
    pairs = gl.permute(gl.join(even, odd), [1, 0, 2])
    piece = gl.reshape(pairs, [COLS, 128]).to(out.dtype)
    tma_store_wait(BUFFERS - 1)
    thread_barrier()
    # An opaque index: the addresses are computed here, not in front of the main loop.
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
    tma_store(out, [row, col], buffer)


@gluon.jit
def store_tile(
    even, odd, out, c_s, row, col, BLOCK_M: gl.constexpr, WG: gl.constexpr, BUFFERS: gl.constexpr
):
    if BLOCK_M == 128:
        e0, e1 = _halves(even, 64, 128)
        o0, o1 = _halves(odd, 64, 128)
        e00, e01 = _halves(e0, 64, 64)
        o00, o01 = _halves(o0, 64, 64)
        e10, e11 = _halves(e1, 64, 64)
        o10, o11 = _halves(o1, 64, 64)
        _store_piece(e00, o00, out, c_s, row, col, 32, WG, BUFFERS, 0)
        _store_piece(e01, o01, out, c_s, row + 32, col, 32, WG, BUFFERS, 1)
        _store_piece(e10, o10, out, c_s, row + 64, col, 32, WG, BUFFERS, 2)
        _store_piece(e11, o11, out, c_s, row + 96, col, 32, WG, BUFFERS, 3)
    elif BLOCK_M == 64:
        e0, e1 = _halves(even, 64, 64)
        o0, o1 = _halves(odd, 64, 64)
        _store_piece(e0, o0, out, c_s, row, col, 32, WG, BUFFERS, 0)
        _store_piece(e1, o1, out, c_s, row + 32, col, 32, WG, BUFFERS, 1)
    else:
        _store_piece(even, odd, out, c_s, row, col, BLOCK_M, WG, BUFFERS, 0)
