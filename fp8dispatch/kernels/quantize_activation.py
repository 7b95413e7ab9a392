"""Dynamic and static quantisation of activations to FP8: one read, one write.

    scale = 1 where amax == 0, else max(amax, 1e-12) / max_value
    data  = round_to_nearest_even(x / scale)

Both divisions are IEEE divisions, so scales and codes equal those of plain torch in float32 bit for
bit. The scale is the multiplier that restores the value.

A NaN or an infinity makes the scale of its own group NaN or infinite and touches no other group:
amax is the largest bit pattern of ``|x|`` as an integer, an order in which NaN is above infinity.
With an infinite scale the finite elements become zero codes and the infinite ones NaN; either way
the dequantised group is non-finite. A dynamic quotient needs no clamp: ``|x / scale|`` exceeds the
largest value by at most one float32 step, which rounds back to it.

Design: for groups of up to 8192 elements a program owns a [rows, groups, group size] tile, so every
load is 16 bytes wide and each amax stays inside one or a few warps; longer groups and whole rows
get one program each, which reads a row of more than 16384 columns twice (the second time from L2).
The division is three instructions rather than the library routine of about twelve with a branch:
multiply by the group's reciprocal, which is rounded correctly, then one residual correction
(Markstein). The result is the exact quotient moved by at most 2**-23 of a float32 step, and then
rounded: no step leaves the normal range, because the scale lies in [2e-15, 1.5e36]. It differs from
IEEE's only where the exact quotient is that near to halfway between two float32 numbers, and the
code of FP8 could differ only if one of these were halfway between two codes. With the scale
``B * 2**i``, x ``A * 2**j`` and the midpoint an odd ``M < 32``, that needs ``2**20 * B * M - A *
2**f`` within 1 of B, with f at least 24: a multiple of 2**20 next to B. Only powers of two, which
divide exactly, and the float32 numbers below them, for which A would need 25 bits, come so near.

Tried before, on one H200 at 8192 x 8192 with 128-column groups: tiles of 16 x 2 groups and 4 warps
run at the speed of a device copy; multiplying by the reciprocal alone changes 7.5e-8 of the codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from fp8dispatch.formats import AMAX_FLOOR, max_value
from fp8dispatch.kernels.float8 import NATIVE, encode_float8, kernel_operand
from fp8dispatch.kernels.grid_dependency import launch_dependents
from fp8dispatch.kernels.interpreter import INTERPRETED
from fp8dispatch.kernels.launch import (
    Launch,
    ceil_div,
    next_power_of_2,
    on_device_of,
    plain_launch,
)

if TYPE_CHECKING:
    import torch

_INFINITY_BITS = tl.constexpr(0x7F800000)
_FLOOR = tl.constexpr(AMAX_FLOOR)

_LONGEST_TILE_GROUP = 8192  # elements of a group that one tile still holds
_LONGEST_SINGLE_PASS = 16384  # elements of a row that stay in registers between amax and division


def quantize_groups(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    launch: Launch = plain_launch,
    *,
    dependents: bool = False,
) -> None:
    """Quantise `x` with one scale for each row and `group_size` columns.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32, any strides.
        data: ``[M, K]`` output, float8_e4m3fn or float8_e4m3fnuz, last stride 1.
        scale: ``[M, ceil(K / group_size)]`` output, float32, any strides.
        group_size: Columns that share a scale; the last group may be shorter.
        launch: How the kernel is started.
        dependents: Let a kernel behind this one start early (`grid_dependency`).
    """
    m, k = x.shape
    if m == 0 or k == 0:
        return
    groups = ceil_div(k, group_size)
    padded = next_power_of_2(min(group_size, k))
    if padded > _LONGEST_TILE_GROUP:
        _quantize_long(x, data, scale, group_size, groups, scale.stride(1), launch, dependents)
        return
    out, code = kernel_operand(data)
    block_rows, block_groups, warps = _tile(m, groups, padded)
    programs = ceil_div(m, block_rows) * ceil_div(groups, block_groups)
    arguments = (
        x, out, scale, m, k, *x.stride(), out.stride(0), scale.stride(0), scale.stride(1),
    )  # fmt: skip
    constants = {
        "GROUP": group_size,
        "PADDED": padded,
        "MAX": max_value(data.dtype),
        "FORMAT": code,
        "ROWS": block_rows,
        "GROUPS": block_groups,
        "DEPENDENTS": dependents,
    }
    with on_device_of(x):
        launch(_quantize_tile_kernel, programs, arguments, constants, warps)


def quantize_rows(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    launch: Launch = plain_launch,
    *,
    dependents: bool = False,
) -> None:
    """Quantise `x` with one scale for each row.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32, any strides.
        data: ``[M, K]`` output, float8_e4m3fn or float8_e4m3fnuz, last stride 1.
        scale: ``[M, 1]`` or ``[M]`` output, float32, any strides.
        launch: How the kernel is started.
        dependents: Let a kernel behind this one start early (`grid_dependency`).
    """
    if x.numel() == 0:
        return
    _quantize_long(x, data, scale, x.shape[1], 1, 0, launch, dependents)


def quantize_static(
    x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, launch: Launch = plain_launch
) -> None:
    """Quantise `x` with a scale that is known already, clamping to the range of the format.

    An element of `x` that is NaN or infinite becomes the NaN code, never the largest value.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32, any strides.
        data: ``[M, K]`` output, float8_e4m3fn or float8_e4m3fnuz, last stride 1.
        scale: One float32 element on the device of `x`; it is read there.
        launch: How the kernel is started.
    """
    m, k = x.shape
    if m == 0 or k == 0:
        return
    out, code = kernel_operand(data)
    block_cols = min(next_power_of_2(k), 1024)
    block_rows = max(1, min(next_power_of_2(m), 4096 // block_cols)) if m > 64 else 1
    programs = ceil_div(m, block_rows) * ceil_div(k, block_cols)
    constants = {
        "MAX": max_value(data.dtype),
        "FORMAT": code,
        "ROWS": block_rows,
        "COLS": block_cols,
    }
    with on_device_of(x):
        arguments = (x, out, scale, m, k, *x.stride(), out.stride(0))
        launch(_quantize_static_kernel, programs, arguments, constants, 4)


def _quantize_long(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    groups: int,
    scale_stride_group: int,
    launch: Launch,
    dependents: bool,
) -> None:
    """One program for each row and group."""
    m, k = x.shape
    out, code = kernel_operand(data)
    padded = next_power_of_2(min(group_size, k))
    single_pass = padded <= _LONGEST_SINGLE_PASS
    block = padded if single_pass else _LONGEST_TILE_GROUP
    arguments = (
        x, out, scale, k, group_size, groups,
        *x.stride(), out.stride(0), scale.stride(0), scale_stride_group,
    )  # fmt: skip
    constants = {
        "MAX": max_value(data.dtype),
        "FORMAT": code,
        "SINGLE_PASS": single_pass,
        "BLOCK": block,
        "DEPENDENTS": dependents,
    }
    warps = min(16, max(1, block // 1024))
    with on_device_of(x):
        launch(_quantize_long_kernel, m * groups, arguments, constants, warps)


def _tile(m: int, groups: int, padded: int) -> tuple[int, int, int]:
    """Return rows, groups and warps of a tile.

    Few rows need many small programs with several warps to hide the latency of memory; from some
    thousands of programs on, 32 elements a thread and the fewest instructions win.
    """
    few = m <= 64
    block_groups = min(max(1, (1024 if few else 256) // padded), next_power_of_2(groups))
    if few:
        return 1, block_groups, max(4, padded // 1024)
    elements = 1024 if m <= 1024 else 4096
    block_rows = max(1, elements // (block_groups * padded))
    return block_rows, block_groups, max(elements, padded) // 1024


@triton.jit
def _scale_of(amax_bits, MAX: tl.constexpr):
    """The scale of a group from the bits of its amax, which may be NaN or infinity."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    floored = tl.where(amax < _FLOOR, _FLOOR, amax)  # a NaN compares false and stays
    scale = tl.div_rn(floored, tl.full(floored.shape, MAX, tl.float32))
    return tl.where(amax_bits == 0, 1.0, scale)


@triton.jit
def _encode(quotient, element_type: tl.constexpr, FORMAT: tl.constexpr):
    """Round float32 to the element type of the output: FP8 itself, or its bytes."""
    return quotient.to(element_type) if FORMAT == NATIVE else encode_float8(quotient, FORMAT)


@triton.jit
def _divide(x, scale):
    """``x / scale``, for FP8 as good as IEEE's, of a scale that is normal, infinite or NaN.

    The residual is taken with its sign turned: so a zero keeps its own. An infinite scale is taken
    as the pair (reciprocal 0, scale 0), for which the correction leaves ``x * 0`` as it is: zero of
    the sign of x, or NaN for an infinite x. Shapes broadcast.
    """
    if INTERPRETED:
        quotient = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    else:
        reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        reciprocal, x = tl.broadcast(reciprocal, x)
        finite = tl.broadcast_to(tl.where(scale == float("inf"), 0.0, scale), x.shape)
        quotient = x * reciprocal
        # Times -1 is a sign in the instruction; Triton's minus is a subtraction from zero.
        quotient = tl.fma(tl.fma(quotient, finite, x * -1.0), reciprocal * -1.0, quotient)
    return quotient


@triton.jit(do_not_specialize=["m", "scale_stride_group"])
def _quantize_tile_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    m,
    k,
    x_stride_row,
    x_stride_col,
    data_stride_row,
    scale_stride_row,
    scale_stride_group,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    MAX: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPENDENTS: tl.constexpr,
):
    """A [ROWS, GROUPS, PADDED] tile; neighbouring programs share rows."""
    if DEPENDENTS:
        launch_dependents()
    num_groups = tl.cdiv(k, GROUP)
    programs_per_row = tl.cdiv(num_groups, GROUPS)
    row_block = tl.program_id(0) // programs_per_row
    group_block = tl.program_id(0) % programs_per_row
    rows = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    groups = group_block * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, PADDED)
    cols = groups[:, None] * GROUP + within[None, :]  # [GROUPS, PADDED]
    valid_cols = cols < k
    if GROUP != PADDED:
        valid_cols &= (within < GROUP)[None, :]
    valid = (rows < m)[:, None, None] & valid_cols[None, :, :]

    x_offsets = rows[:, None, None] * x_stride_row + (cols.to(tl.int64) * x_stride_col)[None, :, :]
    x = tl.load(x_ptr + x_offsets, mask=valid, other=0.0).to(tl.float32)
    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)  # [ROWS, GROUPS]
    scale = _scale_of(amax_bits, MAX)
    quotient = _divide(x, scale[:, :, None])

    data_offsets = rows[:, None, None] * data_stride_row + cols[None, :, :]
    code = _encode(quotient, data_ptr.dtype.element_ty, FORMAT)
    tl.store(data_ptr + data_offsets, code, mask=valid)
    scale_offsets = rows[:, None] * scale_stride_row
    scale_offsets += groups[None, :].to(tl.int64) * scale_stride_group
    valid_scale = (rows < m)[:, None] & (groups < num_groups)[None, :]
    tl.store(scale_ptr + scale_offsets, scale, mask=valid_scale)


@triton.jit(do_not_specialize=["scale_stride_group"])
def _quantize_long_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    k,
    group_size,
    num_groups,
    x_stride_row,
    x_stride_col,
    data_stride_row,
    scale_stride_row,
    scale_stride_group,
    MAX: tl.constexpr,
    FORMAT: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENTS: tl.constexpr,
):
    """One group of one row, in registers or read twice."""
    if DEPENDENTS:
        launch_dependents()
    row = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    first = group * group_size
    end = tl.minimum(first + group_size, k)
    x_row = x_ptr + row * x_stride_row
    data_row = data_ptr + row * data_stride_row
    within = tl.arange(0, BLOCK)
    scale_place = scale_ptr + row * scale_stride_row + group.to(tl.int64) * scale_stride_group

    if SINGLE_PASS:
        cols = first + within
        x = tl.load(x_row + cols.to(tl.int64) * x_stride_col, mask=cols < end, other=0.0)
        x = x.to(tl.float32)
        amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
        scale = _scale_of(tl.full((1,), 0, tl.int32) + amax_bits, MAX)
        code = _encode(_divide(x, scale), data_ptr.dtype.element_ty, FORMAT)
        tl.store(data_row + cols, code, mask=cols < end)
    else:
        largest = tl.zeros((BLOCK,), tl.int32)
        for start in range(first, end, BLOCK):
            cols = start + within
            x = tl.load(x_row + cols.to(tl.int64) * x_stride_col, mask=cols < end, other=0.0)
            bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            largest = tl.maximum(largest, bits)
        scale = _scale_of(tl.full((1,), 0, tl.int32) + tl.max(largest, axis=0), MAX)
        for start in range(first, end, BLOCK):
            cols = start + within
            x = tl.load(x_row + cols.to(tl.int64) * x_stride_col, mask=cols < end, other=0.0)
            quotient = _divide(x.to(tl.float32), scale)
            code = _encode(quotient, data_ptr.dtype.element_ty, FORMAT)
            tl.store(data_row + cols, code, mask=cols < end)
    tl.store(scale_place + tl.arange(0, 1), scale)


@triton.jit
def quantize_tile_static(
    x, scale, element_type: tl.constexpr, MAX: tl.constexpr, FORMAT: tl.constexpr
):
    """FP8 codes of float32 values over given scales of the same shape."""
    quotient = tl.div_rn(x, scale)
    quotient = tl.where(quotient > MAX, MAX, quotient)  # comparisons that leave a NaN alone
    quotient = tl.where(quotient < -MAX, -MAX, quotient)
    finite = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < _INFINITY_BITS
    quotient = tl.where(finite, quotient, float("nan"))
    return _encode(quotient, element_type, FORMAT)


@triton.jit(do_not_specialize=["m"])
def _quantize_static_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    m,
    k,
    x_stride_row,
    x_stride_col,
    data_stride_row,
    MAX: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A [ROWS, COLS] tile; the scale may be any float32, so the division is the library's."""
    programs_per_row = tl.cdiv(k, COLS)
    rows = (tl.program_id(0) // programs_per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % programs_per_row) * COLS + tl.arange(0, COLS)
    valid = (rows < m)[:, None] & (cols < k)[None, :]
    x_offsets = rows[:, None] * x_stride_row + (cols.to(tl.int64) * x_stride_col)[None, :]
    x = tl.load(x_ptr + x_offsets, mask=valid, other=0.0).to(tl.float32)
    scale = tl.zeros((ROWS, COLS), tl.float32) + tl.load(scale_ptr)
    code = quantize_tile_static(x, scale, data_ptr.dtype.element_ty, MAX, FORMAT)
    tl.store(data_ptr + rows[:, None] * data_stride_row + cols[None, :], code, mask=valid)
