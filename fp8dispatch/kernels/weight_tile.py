"""A tile of an FP8 weight, dequantised on its way into a product.

What kernels share that multiply floating operands by FP8 weights: the bytes are widened, multiplied
by their scales in float32 and rounded once to the dtype of the other operand, so that a tile holds
what `dequantize` would have written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8dispatch.kernels.float8 import NATIVE, decode_float8
from fp8dispatch.kernels.interpreter import INTERPRETED, cast_output


def scale_blocks(n: int, k: int, block_size: tuple[int, int] | None) -> tuple[int, int]:
    """SCALE_N and SCALE_K of `load_weight_tile`: the block's sides, 0 where one covers its axis."""
    rows, cols = (1, k) if block_size is None else block_size
    return (0 if rows >= n else rows), (0 if cols >= k else cols)


@triton.jit
def load_weight_tile(
    data_ptr,
    scale_ptr,
    first_row,
    first_col,
    n,
    k,
    stride_n,
    stride_k,
    scale_stride_n,
    scale_stride_k,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The [ROWS, COLS] tile at a multiple of its own size, in DTYPE, zero beyond the edges.

    Where a tile lies inside one block of rows or of columns, its scales are a number or a vector.
    """
    ONE_ROW: tl.constexpr = SCALE_N == 0 or SCALE_N % ROWS == 0
    ONE_COL: tl.constexpr = SCALE_K == 0 or SCALE_K % COLS == 0
    row_index = first_row + tl.arange(0, ROWS)
    col_index = first_col + tl.arange(0, COLS)
    valid = (row_index < n)[:, None] & (col_index < k)[None, :]
    places = data_ptr + row_index.to(tl.int64)[:, None] * stride_n
    places += (col_index.to(tl.int64) * stride_k)[None, :]
    if FORMAT == NATIVE:
        value = tl.load(places, mask=valid, other=0.0).to(tl.float32)
    else:
        value = decode_float8(tl.load(places, mask=valid, other=0), FORMAT).to(tl.float32)

    # A tile begins inside the matrix, so the block of its first row and column always exists.
    row_block = first_row * 0
    if SCALE_N != 0:
        row_block = (first_row if ONE_ROW else row_index) // SCALE_N
    col_block = first_col * 0
    if SCALE_K != 0:
        col_block = (first_col if ONE_COL else col_index) // SCALE_K
    row_offset = tl.cast(row_block, tl.int64) * scale_stride_n
    col_offset = tl.cast(col_block, tl.int64) * scale_stride_k
    if ONE_ROW and ONE_COL:
        value *= tl.load(scale_ptr + row_offset + col_offset)
    elif ONE_COL:
        rows = tl.load(scale_ptr + row_offset + col_offset, mask=row_index < n, other=0.0)
        value *= rows[:, None]
    elif ONE_ROW:
        cols = tl.load(scale_ptr + row_offset + col_offset, mask=col_index < k, other=0.0)
        value *= cols[None, :]
    else:
        spread = scale_ptr + row_offset[:, None] + col_offset[None, :]
        value *= tl.load(spread, mask=valid, other=0.0)
    return dot_operand(cast_output(value, DTYPE))


@triton.jit
def dot_operand(tile):
    """A tile as `tl.dot` takes it: the interpreter's takes the bits of bfloat16 for integers."""
    return tile.to(tl.float32) if INTERPRETED else tile
