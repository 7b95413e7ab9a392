"""Scaled FP8 GEMM over the rows of many experts, each row with the weight of its own.

    out[scatter[s]] = sum over K blocks of (a[gather[s]] @ b[e].T) * a_scale * b_scale[e] + bias[e]

The arithmetic and its accuracy are those of `scaled_gemm`, whose loads this kernel shares; what is
added is where a row comes from and goes to. Rows are sorted by expert, tiles do not cross experts,
and a program finds its expert on the device (`experts_routing`), so the launch depends on shapes
alone and one compiled kernel serves every routing. Rows without an expert are written as zeros:
nothing of the output is left as it was, except rows that `scatter` does not name.

`gather` lets a token that several experts use be quantised once and read where it lies. Tiles that
follow each other share the weights of an expert and a strip of columns, group_m at a time.

Few rows that name their expert are not sorted at all: the program of a row looks through the ids
itself and takes the rows of the same expert with it, so that decoding costs no launch more.

Limits: rows are gathered through pointers, and descriptors (TMA) are used without `gather` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from fp8dispatch.kernels.experts_routing import (
    find_members,
    find_tile,
    map_rows,
    schedule,
    tile_bound,
)
from fp8dispatch.kernels.float8 import NATIVE
from fp8dispatch.kernels.gemm_config import GemmConfig, choose_config
from fp8dispatch.kernels.interpreter import cast_output
from fp8dispatch.kernels.launch import FP_FUSION, ceil_div, device_limits, on_device_of
from fp8dispatch.kernels.scaled_gemm import (
    TMA_CAPABILITY,
    descriptor_of,
    has_tma_layout,
    load_operand,
    operands_of,
    tile_origin,
)
from fp8dispatch.kernels.sorted_rows import NamedRows, SortedRows

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor


MOST_NAMED_ROWS = 128
"""Rows up to which programs look through all expert ids by themselves."""


def experts_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    block_size: tuple[int, int] | None,
    routed: SortedRows | NamedRows,
    config: GemmConfig | None = None,
) -> None:
    """Multiply quantised rows by the quantised weights of their experts into `out`.

    Args:
        a: ``[T, K]``, FP8 of any format, last stride 1, any row stride.
        a_scale: float32 multipliers, ``[T, ceil(K / block_k)]``, or ``[T, 1]`` without
            `block_size`; any strides, 0 included.
        b: ``[E, N, K]``, FP8 of any format, any strides; row-major is fast.
        b_scale: float32 multipliers, ``[E, ceil(N / block_n), ceil(K / block_k)]``, or
            ``[E, N, 1]`` without `block_size`; any strides, 0 included.
        bias: ``[E, N]``, any float dtype and strides, added in float32, or None.
        out: ``[rows, N]``, bfloat16, float16 or float32, any strides. Rows that `scatter` does not
            name are left as they are.
        block_size: ``(block_n, block_k)`` of the weight scale, or None.
        routed: Which rows go to which expert; `NamedRows` of at most `MOST_NAMED_ROWS`.
        config: The tile, for measuring; by default `choose_config` decides.
    """
    rows, (experts, n, k) = routed.rows, b.shape
    if rows == 0:
        return
    limits = device_limits(a.device)
    a_operand, a_format, b_operand, b_format = operands_of(a, b)
    upcast = a_format != NATIVE.value
    flat = b_operand.as_strided((experts * n, k), b.stride()[1:]) if _is_stack(b) else None
    if config is None:
        config = choose_config(
            rows,
            n,
            block_size=block_size,
            upcast=upcast,
            descriptors=not upcast
            and limits.capability >= TMA_CAPABILITY
            and isinstance(routed, SortedRows)
            and routed.gather is None
            and flat is not None
            and has_tma_layout(flat)
            and has_tma_layout(a),
            limits=limits,
            experts=experts,
        )
    a_source: torch.Tensor | TensorDescriptor = a_operand
    b_source: torch.Tensor | TensorDescriptor = b_operand
    if config.descriptors and flat is not None:
        a_source = descriptor_of(a_operand, config.block_m, config.block_k)
        b_source = descriptor_of(flat, config.block_n, config.block_k)
    if isinstance(routed, SortedRows):
        index = torch.empty((2, experts + 1), dtype=torch.int32, device=b.device)
        schedule(routed.ends, rows, config.block_m, index[0], index[1])
        gather, scatter = routed.gather, routed.scatter
        tiles_m = tile_bound(rows, experts, config.block_m)
    else:
        index, gather, scatter, tiles_m = routed.expert_ids, routed.gather, None, rows
    scale_n, scale_k = (0, 0) if block_size is None else block_size
    tiles = tiles_m * ceil_div(n, config.block_n)
    programs = config.programs_per_sm * limits.multiprocessors or tiles
    with on_device_of(a):
        _experts_gemm_kernel[(min(programs, tiles),)](
            a_source,
            b_source,
            a_scale,
            b_scale,
            bias,
            out,
            index,
            gather,
            scatter,
            a.shape[0],
            rows,
            tiles_m,
            experts,
            n,
            k,
            a.stride(0),
            *b.stride(),
            *a_scale.stride(),
            *b_scale.stride(),
            *((0, 0) if bias is None else bias.stride()),
            *out.stride(),
            index.stride(0),
            0 if gather is None else gather.stride(0),
            0 if scatter is None else scatter.stride(0),
            STEPS=(experts + 1).bit_length(),
            NAMED=0 if isinstance(routed, SortedRows) else MOST_NAMED_ROWS,
            SCALE_N=scale_n,
            SCALE_K=scale_k,
            EVEN_K=(k if block_size is None else scale_k) % config.block_k == 0
            and k % config.block_k == 0,
            A_FORMAT=a_format,
            B_FORMAT=b_format,
            DESCRIPTORS=config.descriptors,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            enable_fp_fusion=FP_FUSION,
            num_stages=config.num_stages,
        )


def _is_stack(b: torch.Tensor) -> bool:
    """The experts lie one after the other, so that all their rows are one matrix."""
    return b.stride(0) == b.shape[1] * b.stride(1)


@triton.jit
def _load_scales(
    a_scale_rows,
    a_scale_stride_k,
    live,
    b_scale_rows,
    b_scale_stride_k,
    col_valid,
    block,
    blocks,
    ONE_WEIGHT_SCALE: tl.constexpr,
):
    """Scales of one block of K; past the end those of the last, which nobody uses."""
    wide = tl.minimum(tl.cast(block, tl.int64), blocks - 1)
    a_scale = tl.load(a_scale_rows + wide * a_scale_stride_k, mask=live, other=0.0)
    b_places = b_scale_rows + wide * b_scale_stride_k
    if ONE_WEIGHT_SCALE:
        b_scale = tl.load(b_places)
    else:
        b_scale = tl.load(b_places, mask=col_valid, other=0.0)
    return a_scale, b_scale


@triton.jit(do_not_specialize=["inputs", "rows", "tiles_m", "a_scale_stride_m", "a_scale_stride_k"])
def _experts_gemm_kernel(
    a,
    b,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    index_ptr,  # [2, E + 1]: ends of rows, cumulative tiles; or with NAMED [rows]: expert ids
    gather_ptr,
    scatter_ptr,
    inputs,
    rows,
    tiles_m,
    experts,
    n,
    k,
    a_stride_m,
    b_stride_e,
    b_stride_n,
    b_stride_k,
    a_scale_stride_m,
    a_scale_stride_k,
    b_scale_stride_e,
    b_scale_stride_n,
    b_scale_stride_k,
    bias_stride_e,
    bias_stride_n,
    out_stride_m,
    out_stride_n,
    index_stride,
    gather_stride,
    scatter_stride,
    STEPS: tl.constexpr,
    NAMED: tl.constexpr,  # 0: rows are sorted by expert
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
):
    """Tiles of the output; a program takes every num_programs-th of them."""
    BLOCKWISE: tl.constexpr = SCALE_K > 0
    ONE_WEIGHT_SCALE: tl.constexpr = BLOCKWISE and SCALE_N % BLOCK_N == 0
    if BLOCKWISE:
        CHUNKS: tl.constexpr = (SCALE_K + BLOCK_K - 1) // BLOCK_K  # of one scale block
        blocks = tl.cdiv(k, SCALE_K)
        all_chunks = (blocks - 1) * CHUNKS + tl.cdiv(k - (blocks - 1) * SCALE_K, BLOCK_K)
    else:
        CHUNKS: tl.constexpr = 1
        all_chunks = tl.cdiv(k, BLOCK_K)
    tiles = tiles_m * tl.cdiv(n, BLOCK_N)

    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_tile, first_col = tile_origin(tile, tiles_m, n, 1, BLOCK_N, GROUP_M)
        if NAMED > 0:
            group, row_index, in_group = find_members(
                row_tile, index_ptr, index_stride, rows, experts, NAMED, BLOCK_M
            )
            first_row = 0
        else:
            group, first_row, end_row = find_tile(
                row_tile, index_ptr, index_ptr + experts + 1, experts + 1, STEPS, BLOCK_M
            )
            row_index = first_row + tl.arange(0, BLOCK_M)
            in_group = row_index < end_row
        col_index = first_col + tl.arange(0, BLOCK_N)
        target, written = map_rows(scatter_ptr, scatter_stride, row_index, in_group, rows)
        # Rows of the group behind the last expert, and of none, multiply nothing and are zeros.
        live = written & (tl.zeros_like(row_index) + group < experts)
        source, live = map_rows(gather_ptr, gather_stride, row_index, live, inputs)
        expert = tl.minimum(group, experts - 1).to(tl.int64)
        chunks = tl.where(group < experts, all_chunks, 0)
        col_valid = col_index < n
        cols = col_index.to(tl.int64)
        a_rows = source * a_stride_m
        b_rows = cols * b_stride_n
        a_scale_rows = a_scale_ptr + source * a_scale_stride_m
        b_scale_expert = b_scale_ptr + expert * b_scale_stride_e
        if DESCRIPTORS:
            b_expert = b
            b_row = expert.to(tl.int32) * n + first_col
        else:
            b_expert = b + expert * b_stride_e
            b_row = first_col
        if not BLOCKWISE:
            a_scale = tl.load(a_scale_rows, mask=live, other=0.0)
        elif ONE_WEIGHT_SCALE:
            b_scale_rows = b_scale_expert + (first_col // SCALE_N).to(tl.int64) * b_scale_stride_n
        else:
            b_scale_rows = b_scale_expert + (col_index // SCALE_N).to(tl.int64) * b_scale_stride_n

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BLOCKWISE:  # scales are loaded one turn ahead, as in `scaled_gemm`
            a_scale, b_scale = _load_scales(
                a_scale_rows, a_scale_stride_k, live,
                b_scale_rows, b_scale_stride_k, col_valid,
                0, blocks, ONE_WEIGHT_SCALE,
            )  # fmt: skip
        for chunk in range(chunks):
            if BLOCKWISE:
                block = chunk // CHUNKS
                first_k = block * SCALE_K + (chunk % CHUNKS) * BLOCK_K
                end_k = tl.minimum(block * SCALE_K + SCALE_K, k)
                next_a_scale, next_b_scale = _load_scales(
                    a_scale_rows, a_scale_stride_k, live,
                    b_scale_rows, b_scale_stride_k, col_valid,
                    (chunk + 1) // CHUNKS, blocks, ONE_WEIGHT_SCALE,
                )  # fmt: skip
            else:
                first_k = chunk * BLOCK_K
                end_k = k
            a_tile = load_operand(
                a, first_row, first_k, live, a_rows, 1, end_k,
                DESCRIPTORS, EVEN_K, A_FORMAT, BLOCK_K,
            )  # fmt: skip
            b_tile = load_operand(
                b_expert, b_row, first_k, col_valid, b_rows, b_stride_k, end_k,
                DESCRIPTORS, EVEN_K, B_FORMAT, BLOCK_K,
            )  # fmt: skip
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
            b_places = b_scale_expert + cols * b_scale_stride_n
            acc *= tl.load(b_places, mask=col_valid, other=0.0)[None, :]
        if bias_ptr is not None:
            bias_places = bias_ptr + expert * bias_stride_e + cols * bias_stride_n
            acc += tl.load(bias_places, mask=col_valid, other=0.0).to(tl.float32)[None, :]
        # Also where a NaN of the weight met a zero row, or the rows of another expert were read.
        acc = tl.where(live[:, None], acc, 0.0)
        places = out_ptr + target[:, None] * out_stride_m + cols[None, :] * out_stride_n
        valid = written[:, None] & col_valid[None, :]
        tl.store(places, cast_output(acc, out_ptr.dtype.element_ty), mask=valid)
