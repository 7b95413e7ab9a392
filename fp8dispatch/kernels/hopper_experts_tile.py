"""Parts of `hopper_experts`: where a tile is, and how its rows reach their places.

The design is described there; these are the device functions that its partitions call.
"""

from __future__ import annotations

from fp8dispatch.kernels.gluon_compat import gl, gluon, thread_barrier


@gluon.jit
def place_in_expert(tile, start, end, TILES_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row, and column of tiles, of one tile of an expert; the tests run it as Python.

    GROUP_M tile rows are walked together, column by column. The first tile of an expert without
    rows, which nobody computes, is at its start.
    """
    tiles_m = (end - start + 127) // 128
    group = tile // (GROUP_M * TILES_N)
    place = tile - group * (GROUP_M * TILES_N)
    left = tiles_m - group * GROUP_M
    rows = left if left < GROUP_M else GROUP_M
    rows = rows if rows > 0 else 1
    col = place // rows
    return start + (group * GROUP_M + place - col * rows) * 128, col


@gluon.jit
def _opaque(value):
    """The same integer; what is computed from it stays behind this place, not before a loop."""
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [value], gl.int32, False, 1)


@gluon.jit
def find_tile(table, tile, tiles, TILES_N: gl.constexpr):
    """Expert of a tile, the expert's first and last row, and which of the expert's tiles it is.

    What is no tile is read like the first one of an expert 0 without rows.
    """
    exists = tile < tiles
    entry = table + 4 + gl.where(exists, tile // TILES_N, 0) * 4
    expert = gl.load(entry, mask=exists, other=0)
    start = gl.load(entry + 1, mask=exists, other=0)
    end = gl.load(entry + 2, mask=exists, other=0)
    before = gl.load(entry + 3, mask=exists, other=0)
    return expert, start, end, gl.where(exists, tile, 0) - before * TILES_N


@gluon.jit
def look_up(
    table,
    b_scale,
    zero,
    tile,
    tiles,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """What a consumer must know of a tile before it begins.

    Returns:
        Expert, end of its rows, first row, column of tiles; where the left half's block scales
        are, how far behind them the right half's; both's for the first block of K.
    """
    TILES_N: gl.constexpr = (N + 255) // 256
    SCALE_ROWS: gl.constexpr = (N + 127) // 128
    COUNT: gl.constexpr = (K + 127) // 128
    zero = _opaque(zero)
    scales = b_scale + zero
    expert, start, end, number = find_tile(table + zero, tile, tiles, TILES_N)
    row, tile_n = place_in_expert(number, start, end, TILES_N, GROUP_M)
    place = scales
    right = 0
    if BLOCKWISE:
        place = scales + (expert * SCALE_ROWS + tile_n * 2) * COUNT
        right = gl.where(tile_n * 2 + 1 < SCALE_ROWS, COUNT, 0)
    return expert, end, row, tile_n, place, right, gl.load(place), gl.load(place + right)


@gluon.jit
def _halves(x, ROWS: gl.constexpr, COLS: gl.constexpr):
    return gl.split(gl.permute(gl.reshape(x, [ROWS, 2, COLS // 2]), [0, 2, 1]))


@gluon.jit
def _store_piece(
    piece,
    out,
    c_s,
    b_scale,
    bias,
    expert,
    target,
    col,
    N: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    WG: gl.constexpr,
    i: gl.constexpr,
    LINES: gl.constexpr,
):
    """64 rows and 128 bytes of columns: scale, bias, one rounding, and whole lines to their rows.

    The lines are put together in shared memory. A consumer's two buffers take turns, so that the
    barrier between writing and reading one of them also stands between reading the other and
    writing that again.
    """
    WIDTH: gl.constexpr = piece.shape[1]
    cols = col + gl.arange(0, WIDTH, gl.SliceLayout(0, piece.type.layout))
    if not BLOCKWISE:
        own = b_scale + expert.to(gl.int64) * (N if SCALE_STRIDE > 0 else 1)
        scale = gl.load(own + cols * SCALE_STRIDE, mask=cols < N, other=0.0)
        piece = piece * gl.expand_dims(scale, 0)
    if bias is not None:
        own_bias = bias + expert.to(gl.int64) * N
        added = gl.load(own_bias + cols, mask=cols < N, other=0.0).to(gl.float32)
        piece = piece + gl.expand_dims(added, 0)
    buffer = c_s.index(_opaque(gl.to_tensor(WG * 2 + i % 2)))
    buffer.store(piece.to(out.dtype.element_ty))
    thread_barrier()
    line = col + gl.arange(0, WIDTH, gl.SliceLayout(0, LINES))
    places = gl.expand_dims(target.to(gl.int64) * N, 1) + gl.expand_dims(line, 0)
    valid = gl.expand_dims(target >= 0, 1) & gl.expand_dims(line < N, 0)
    gl.store(out + places, buffer.load(LINES), mask=valid)


@gluon.jit
def store_half(
    acc,
    out,
    c_s,
    b_scale,
    bias,
    expert,
    target,
    col,
    N: gl.constexpr,
    BLOCKWISE: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    WG: gl.constexpr,
    LINES: gl.constexpr,
):
    """64x128 of the output, in pieces."""
    x, y = _halves(acc, 64, 128)
    if c_s.shape[2] == 32:
        x0, x1 = _halves(x, 64, 64)
        y0, y1 = _halves(y, 64, 64)
        _store_piece(
            x0, out, c_s, b_scale, bias, expert, target, col,
            N, BLOCKWISE, SCALE_STRIDE, WG, 0, LINES,
        )  # fmt: skip
        _store_piece(
            x1, out, c_s, b_scale, bias, expert, target, col + 32,
            N, BLOCKWISE, SCALE_STRIDE, WG, 1, LINES,
        )  # fmt: skip
        _store_piece(
            y0, out, c_s, b_scale, bias, expert, target, col + 64,
            N, BLOCKWISE, SCALE_STRIDE, WG, 2, LINES,
        )  # fmt: skip
        _store_piece(
            y1, out, c_s, b_scale, bias, expert, target, col + 96,
            N, BLOCKWISE, SCALE_STRIDE, WG, 3, LINES,
        )  # fmt: skip
    else:
        _store_piece(
            x, out, c_s, b_scale, bias, expert, target, col,
            N, BLOCKWISE, SCALE_STRIDE, WG, 0, LINES,
        )  # fmt: skip
        _store_piece(
            y, out, c_s, b_scale, bias, expert, target, col + 64,
            N, BLOCKWISE, SCALE_STRIDE, WG, 1, LINES,
        )  # fmt: skip
