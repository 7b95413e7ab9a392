"""Scaled FP8 GEMM with exact accumulation: block, row and tensor scales, one kernel.

    out = sum over K blocks of (a_block @ b_block.T) * a_scale * b_scale + bias

Accuracy class ``exact``: a partial product covers at most 128 of K, starts from a zero accumulator,
and is promoted into float32 registers. An FP8 accumulator inside the tensor core holds about 14
bits on Hopper, and Triton folds ``acc += tl.dot(a, b)`` into a dot that accumulates there (3.6 and
3.9: for every target except FP8 operands on capability 9.0, which nothing promises), so every
partial product enters the sum through a fused multiply-add with a run-time scale: the block's
scales, or, in the row and tensor recipes, the row's activation scale, which costs no more than the
plain addition would.

Scales never change inside a chunk of K: the loop walks scale block by scale block in chunks of
BLOCK_K, masked where BLOCK_K does not divide the block. Where a tile lies inside one block of
weight rows, that scale is one number and is folded into the row scale; elsewhere it is a vector.
The scales of the next chunk are loaded before the dot of this one, so that their latency passes
under it; loaded and multiplied in the same turn they delay each dot by a trip to L2.

Formats that the device cannot multiply are viewed as bytes, decoded to float16 (exact) and
multiplied there. Without scales of their own, `a` are unquantised activations: the weight's codes
are widened to their dtype, which holds every code exactly, and the same promotion applies. Ragged
edges are masked; masked operands are zero on both sides, so NaN codes beyond an edge cannot arise,
and a NaN row of `a` stays in its row. Row offsets are 64-bit.

Limits: no split along K, so M <= 64 with a small N leaves SMs idle; no column-major fast path, a
transposed `b` is right but its loads are turned around in registers. Tile choice and what was tried
are in `gemm_config`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fp8dispatch.kernels.float8 import (
    FORMAT_CODES,
    NATIVE,
    WIDE,
    decode_float8,
    kernel_operand,
)
from fp8dispatch.kernels.gemm_config import GemmConfig, choose_config, fit_wide
from fp8dispatch.kernels.gemm_tiles import with_tile
from fp8dispatch.kernels.interpreter import cast_output
from fp8dispatch.kernels.launch import FP_FUSION, ceil_div, device_limits, on_device_of
from fp8dispatch.kernels.weight_tile import dot_operand

if TYPE_CHECKING:
    import torch

    from fp8dispatch.kernels.tile import Tile

TMA_CAPABILITY = (9, 0)
_TMA_ALIGNMENT = 16  # bytes, of the base address and of the row stride


class GemmCall(NamedTuple):
    """One launch of the kernel: its grid, its arguments in their order, and the tile."""

    programs: int
    operands: tuple[torch.Tensor, torch.Tensor]
    boxes: tuple[list[int], ...]  # of tensor maps on both; empty where they are pointers
    rest: tuple[Any, ...]
    constants: dict[str, Any]
    config: GemmConfig


def scaled_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    block_size: tuple[int, int] | None,
    config: GemmConfig | None = None,
    tile_rows: int | None = None,
    tile: Tile | None = None,
) -> None:
    """Multiply activations by a quantised weight into `out`.

    Args:
        a: ``[M, K]``, FP8 of any format, or bfloat16, float16 or float32; last stride 1, any row
            stride.
        a_scale: float32 multipliers of FP8 activations, ``[M, ceil(K / block_k)]``, or ``[M, 1]``
            without `block_size`; any strides, 0 included. None for the other dtypes.
        b: ``[N, K]``, FP8 of any format, any strides; row-major is fast.
        b_scale: float32 multipliers, ``[ceil(N / block_n), ceil(K / block_k)]``, or ``[N, 1]``
            without `block_size`; any strides, 0 included.
        bias: ``[N]``, any float dtype and stride, added in float32, or None.
        out: ``[M, N]``, bfloat16, float16 or float32, any strides; every element is written.
        block_size: ``(block_n, block_k)`` of the weight scale, any positive integers, or None for
            one scale per row of `a` and of `b`.
        config: The tile, for measuring; by default `choose_config` decides.
        tile_rows: The M that the tile is chosen for, where it must not depend on `a`.
        tile: What takes the place of the chosen tile, where it applies to it.
    """
    if a.shape[0] == 0 or b.shape[0] == 0:
        return
    call = gemm_call(a, a_scale, b, b_scale, bias, out, block_size, config, tile_rows, tile)
    maps = zip(call.operands, call.boxes, strict=False)  # no boxes: pointers
    sources = tuple(descriptor_of(operand, *box) for operand, box in maps) or call.operands
    with on_device_of(a):
        scaled_gemm_kernel[(call.programs,)](
            *sources,
            *call.rest,
            **call.constants,
            num_warps=call.config.num_warps,
            enable_fp_fusion=FP_FUSION,
            num_stages=call.config.num_stages,
        )


def gemm_call(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    block_size: tuple[int, int] | None,
    config: GemmConfig | None = None,
    tile_rows: int | None = None,
    tile: Tile | None = None,
) -> GemmCall:
    """The launch of `scaled_gemm` with the same arguments; M and N are at least 1."""
    (m, k), n = a.shape, b.shape[0]
    a_operand, a_format, b_operand, b_format = operands_of(a, b)
    upcast = a_format != NATIVE.value
    limits = device_limits(a.device)
    if config is None:
        config = choose_config(
            m if tile_rows is None else tile_rows,
            n,
            block_size=block_size,
            upcast=upcast,
            descriptors=not upcast
            and k > 0
            and limits.capability >= TMA_CAPABILITY
            and has_tma_layout(a)
            and has_tma_layout(b),
            limits=limits,
        )
        if tile is not None:
            config = with_tile(config, tile, block_size, upcast, limits)
        if a_format == WIDE.value:
            config = fit_wide(config, a.element_size(), limits)
    boxes: tuple[list[int], ...] = ()
    if config.descriptors:
        boxes = ([config.block_m, config.block_k], [config.block_n, config.block_k])
    scale_n, scale_k = (0, 0) if block_size is None else block_size
    tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    rest = (
        a_scale, b_scale, bias, out, m, n, k, a.stride(0), *b.stride(),
        *((0, 0) if a_scale is None else a_scale.stride()), *b_scale.stride(),
        0 if bias is None else bias.stride(0), *out.stride(),
    )  # fmt: skip
    whole = (k if block_size is None else scale_k) % config.block_k == 0
    constants = {
        "SCALE_N": scale_n,
        "SCALE_K": scale_k,
        "EVEN_K": whole and k % config.block_k == 0,
        "A_FORMAT": a_format,
        "B_FORMAT": b_format,
        "DESCRIPTORS": config.descriptors,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "FLATTEN": config.flatten,
    }
    programs = min(config.programs_per_sm * limits.multiprocessors or tiles, tiles)
    return GemmCall(programs, (a_operand, b_operand), boxes, rest, constants, config)


def operands_of(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor, int]:
    """Both operands as they are, or both as bytes: a dot cannot mix FP8 with float16."""
    if a.dtype not in FORMAT_CODES:
        return a, WIDE.value, *kernel_operand(b)
    a_operand, a_format = kernel_operand(a)
    b_operand, b_format = kernel_operand(b)
    if NATIVE.value in (a_format, b_format) and a_format != b_format:
        a_operand, a_format = kernel_operand(a, native=False)
        b_operand, b_format = kernel_operand(b, native=False)
    return a_operand, a_format, b_operand, b_format


def has_tma_layout(operand: torch.Tensor) -> bool:
    """Whether a TMA descriptor can describe a 2-D tensor of one-byte elements."""
    rows, cols = operand.shape
    stride_row, stride_col = operand.stride()
    return (
        stride_col == 1
        and stride_row % _TMA_ALIGNMENT == 0
        and stride_row >= cols
        and operand.data_ptr() % _TMA_ALIGNMENT == 0
        and rows > 0
    )


def descriptor_of(operand: torch.Tensor, block_rows: int, block_cols: int) -> TensorDescriptor:
    return TensorDescriptor(
        operand, list(operand.shape), list(operand.stride()), [block_rows, block_cols]
    )


@triton.jit
def tile_origin(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: GROUP_M tile rows are walked together along N."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    first_tile_m = group * GROUP_M
    rows_in_group = tl.minimum(tl.cdiv(m, BLOCK_M) - first_tile_m, GROUP_M)
    place = tile % (GROUP_M * tiles_n)
    return (first_tile_m + place % rows_in_group) * BLOCK_M, (place // rows_in_group) * BLOCK_N


@triton.jit
def load_operand(
    source,
    first_row,
    first_col,
    rows_valid,
    row_offsets,
    stride_col,
    col_end,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A [rows, BLOCK_K] tile of an operand, zero beyond its edges, ready for the dot."""
    if DESCRIPTOR:
        tile = source.load([first_row, first_col])
    else:
        cols = first_col + tl.arange(0, BLOCK_K)
        places = source + row_offsets[:, None] + (cols.to(tl.int64) * stride_col)[None, :]
        valid = rows_valid[:, None]
        if not EVEN_K:
            valid = valid & (cols < col_end)[None, :]
        if FORMAT >= 0:
            tile = tl.load(places, mask=valid, other=0)
        else:
            tile = tl.load(places, mask=valid, other=0.0)
    if FORMAT >= 0:
        tile = decode_float8(tile, FORMAT)
    return tile


@triton.jit
def _load_scales(
    a_scale_rows,
    a_scale_stride_k,
    row_index,
    m,
    b_scale_rows,
    b_scale_stride_k,
    col_index,
    n,
    block,
    blocks,
    ONE_WEIGHT_SCALE: tl.constexpr,
):
    """Scales of one block of K: a vector for the rows, a number or a vector for the columns.

    A block past the end reads nothing and gives zeros. Activations without scales have ones.
    """
    wide = tl.cast(block, tl.int64)
    exists = wide < blocks
    if a_scale_rows is None:
        a_scale = tl.full(row_index.shape, 1.0, tl.float32)
    else:
        row_valid = row_index < tl.where(exists, m, 0)
        a_scale = tl.load(a_scale_rows + wide * a_scale_stride_k, mask=row_valid, other=0.0)
    b_places = b_scale_rows + wide * b_scale_stride_k
    if ONE_WEIGHT_SCALE:
        b_scale = tl.load(b_places, mask=exists, other=0.0)
    else:
        b_scale = tl.load(b_places, mask=col_index < tl.where(exists, n, 0), other=0.0)
    return a_scale, b_scale


@triton.jit(do_not_specialize=["m", "a_scale_stride_k"])
def scaled_gemm_kernel(
    a,
    b,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    a_stride_m,
    b_stride_n,
    b_stride_k,
    a_scale_stride_m,
    a_scale_stride_k,
    b_scale_stride_n,
    b_scale_stride_k,
    bias_stride,
    out_stride_m,
    out_stride_n,
    SCALE_N: tl.constexpr,  # 0: one scale per row of a and of b
    SCALE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    A_FORMAT: tl.constexpr,
    B_FORMAT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Tiles of the output; a program takes every num_programs-th of them."""
    BLOCKWISE: tl.constexpr = SCALE_K > 0
    ONE_WEIGHT_SCALE: tl.constexpr = BLOCKWISE and SCALE_N % BLOCK_N == 0
    if BLOCKWISE:
        CHUNKS: tl.constexpr = (SCALE_K + BLOCK_K - 1) // BLOCK_K  # of one scale block
        blocks = tl.cdiv(k, SCALE_K)
        # The last block may be short: chunks that begin past K are left out.
        chunks = (blocks - 1) * CHUNKS + tl.cdiv(k - (blocks - 1) * SCALE_K, BLOCK_K)
    else:
        CHUNKS: tl.constexpr = 1
        chunks = tl.cdiv(k, BLOCK_K)
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)

    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        first_row, first_col = tile_origin(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        row_index = first_row + tl.arange(0, BLOCK_M)
        col_index = first_col + tl.arange(0, BLOCK_N)
        row_valid = row_index < m
        col_valid = col_index < n
        rows = row_index.to(tl.int64)
        cols = col_index.to(tl.int64)
        a_rows = rows * a_stride_m
        b_rows = cols * b_stride_n
        a_scale_rows = a_scale_ptr
        if a_scale_ptr is not None:
            a_scale_rows += rows * a_scale_stride_m
        if not BLOCKWISE:
            if a_scale_ptr is None:
                a_scale = tl.full((BLOCK_M,), 1.0, tl.float32)
            else:
                a_scale = tl.load(a_scale_rows, mask=row_valid, other=0.0)
        elif ONE_WEIGHT_SCALE:
            b_scale_rows = b_scale_ptr + (first_col // SCALE_N).to(tl.int64) * b_scale_stride_n
        else:
            b_scale_rows = b_scale_ptr + (col_index // SCALE_N).to(tl.int64) * b_scale_stride_n

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BLOCKWISE:
            a_scale, b_scale = _load_scales(
                a_scale_rows, a_scale_stride_k, row_index, m,
                b_scale_rows, b_scale_stride_k, col_index, n,
                0, blocks, ONE_WEIGHT_SCALE,
            )  # fmt: skip
        for chunk in range(chunks):
            if BLOCKWISE:
                block = chunk // CHUNKS
                first_k = block * SCALE_K + (chunk % CHUNKS) * BLOCK_K
                end_k = tl.minimum(block * SCALE_K + SCALE_K, k)
                next_a_scale, next_b_scale = _load_scales(
                    a_scale_rows, a_scale_stride_k, row_index, m,
                    b_scale_rows, b_scale_stride_k, col_index, n,
                    (chunk + 1) // CHUNKS, blocks, ONE_WEIGHT_SCALE,
                )  # fmt: skip
            else:
                first_k = chunk * BLOCK_K
                end_k = k
            a_tile = load_operand(
                a, first_row, first_k, row_valid, a_rows, 1, end_k,
                DESCRIPTORS, EVEN_K, A_FORMAT, BLOCK_K,
            )  # fmt: skip
            b_tile = load_operand(
                b, first_col, first_k, col_valid, b_rows, b_stride_k, end_k,
                DESCRIPTORS, EVEN_K, B_FORMAT, BLOCK_K,
            )  # fmt: skip
            if A_FORMAT == WIDE:
                b_tile = dot_operand(b_tile.to(a_tile.dtype))
                partial = tl.dot(dot_operand(a_tile), tl.trans(b_tile), input_precision="ieee")
            else:
                partial = tl.dot(a_tile, tl.trans(b_tile))
            if not BLOCKWISE:
                factor = tl.broadcast_to(a_scale[:, None], (BLOCK_M, BLOCK_N))
            elif ONE_WEIGHT_SCALE:
                factor = tl.broadcast_to((a_scale * b_scale)[:, None], (BLOCK_M, BLOCK_N))
            else:
                factor = a_scale[:, None] * b_scale[None, :]
            acc = tl.fma(partial, factor, acc)
            if BLOCKWISE:
                a_scale = next_a_scale
                b_scale = next_b_scale

        if not BLOCKWISE:
            b_scale = tl.load(b_scale_ptr + cols * b_scale_stride_n, mask=col_valid, other=0.0)
            acc *= b_scale[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols * bias_stride, mask=col_valid, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        places = out_ptr + rows[:, None] * out_stride_m + cols[None, :] * out_stride_n
        valid = row_valid[:, None] & col_valid[None, :]
        tl.store(places, cast_output(acc, out_ptr.dtype.element_ty), mask=valid)
