"""Operations that end in FP8 activations: RMSNorm and SiLU-gating, each with its quantisation.

    rms_norm_quantize   h = x (+ residual);  y = h * weight / sqrt(mean(h^2) + eps);  quantise y
    silu_mul_quantize   y = gate / (1 + exp(-gate)) * up;                              quantise y

Apart, the operation writes y in 16 bits and the quantiser reads it again; here every input is read
once, the data and the scales are written once, and y is never rounded on the way (float32 from the
load to the FP8 code). A residual is added in float32 and rounded to its own dtype first, because
that is what the model goes on with and what is normalised.

Design: one program for each row, or for a part of a row where no sum runs over it, holding a
[groups, group size] tile in registers, 32 elements a thread. The scale, the division and the
rounding are those of `quantize_activation`. A row too long for registers is read twice, the second
time from L2: its amax is that of ``h * weight`` times the row's factor, which is the amax of y to
the bit, since rounding keeps the order of products by one positive number.

Limits: the sum of squares is one tree per row, so its last bits depend on the row's length; a group
longer than 8192 columns that is not the whole row is not taken (`takes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from fp8dispatch.formats import max_value
from fp8dispatch.kernels.float8 import kernel_operand
from fp8dispatch.kernels.interpreter import cast_output
from fp8dispatch.kernels.launch import FP_FUSION, ceil_div, next_power_of_2, on_device_of
from fp8dispatch.kernels.quantize_activation import _divide, _encode, _scale_of

if TYPE_CHECKING:
    import torch

_LONGEST_SINGLE_PASS = 16384  # elements of a row that stay in registers, 32 for each thread
_CHUNK = 8192  # elements of a row that is read twice, at a time


def takes(k: int, group_size: int) -> bool:
    """Whether the kernels quantise rows of `k` columns in groups of `group_size`."""
    return group_size >= k or next_power_of_2(group_size) <= _CHUNK


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    data: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """Normalise rows by their root mean square and quantise them.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32, any strides.
        weight: ``[K]``, a float dtype, any stride.
        eps: added to the mean of the squares.
        data: ``[M, K]`` output, float8_e4m3fn or float8_e4m3fnuz, last stride 1.
        scale: ``[M, ceil(K / group_size)]`` output, float32, any strides.
        group_size: columns that share a scale; K or more gives one scale per row.
        residual: ``[M, K]`` in the dtype of `x`, any strides, added before the norm, or None.
        total: ``[M, K]`` output of ``x + residual`` in their dtype, any strides; with `residual`.
    """
    m, k = x.shape
    if m == 0 or k == 0:
        return
    out, code = kernel_operand(data)
    group, padded, groups = _row_tile(k, group_size)
    single_pass = groups * padded <= _LONGEST_SINGLE_PASS
    per_row = not single_pass and group_size >= k
    if per_row:
        group = padded = _CHUNK
        groups = 1
    elif not single_pass:
        groups = _CHUNK // padded
    with on_device_of(x):
        _rms_norm_quantize_kernel[(m,)](
            x,
            residual,
            weight,
            out,
            scale,
            total,
            k,
            eps,
            *x.stride(),
            *_strides(residual),
            weight.stride(0),
            data.stride(0),
            *scale.stride(),
            *_strides(total),
            GROUP=group,
            PADDED=padded,
            GROUPS=groups,
            PER_ROW=per_row,
            SINGLE_PASS=single_pass,
            MAX=max_value(data.dtype),
            FORMAT=code,
            num_warps=_warps(groups * padded),
            enable_fp_fusion=FP_FUSION,
        )


def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
) -> None:
    """Multiply ``silu(gate)`` by `up` and quantise the product.

    Args:
        gate: ``[M, K]``, bfloat16, float16 or float32, any strides.
        up: ``[M, K]``, bfloat16, float16 or float32, any strides.
        data: ``[M, K]`` output, float8_e4m3fn or float8_e4m3fnuz, last stride 1.
        scale: ``[M, ceil(K / group_size)]`` output, float32, any strides.
        group_size: columns that share a scale; K or more gives one scale per row.
    """
    m, k = gate.shape
    if m == 0 or k == 0:
        return
    out, code = kernel_operand(data)
    group, padded, groups = _row_tile(k, group_size)
    per_row = group_size >= k
    single_pass = not per_row or padded <= _LONGEST_SINGLE_PASS
    parts = 1
    if not single_pass:
        group = padded = _CHUNK
    elif not per_row:
        # No sum runs over a row, so groups are independent: many programs where rows are few.
        groups = min(groups, max(1, (1024 if m <= 64 else 4096) // padded))
        parts = ceil_div(ceil_div(k, group), groups)
    with on_device_of(gate):
        _silu_mul_quantize_kernel[(m * parts,)](
            gate,
            up,
            out,
            scale,
            k,
            parts,
            *gate.stride(),
            *up.stride(),
            data.stride(0),
            *scale.stride(),
            GROUP=group,
            PADDED=padded,
            GROUPS=groups,
            SINGLE_PASS=single_pass,
            MAX=max_value(data.dtype),
            FORMAT=code,
            num_warps=_warps(groups * padded),
            enable_fp_fusion=FP_FUSION,
        )


def _row_tile(k: int, group_size: int) -> tuple[int, int, int]:
    """Group size, its power of two, and the power of two of groups that cover a row."""
    group = min(group_size, k)
    return group, next_power_of_2(group), next_power_of_2(ceil_div(k, group))


def _warps(elements: int) -> int:
    return min(16, max(1, elements // 1024))


def _strides(matrix: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


@triton.jit
def _load_row(row_ptr, stride, cols, valid):
    """Columns of a row in float32; zero where not valid."""
    return tl.load(row_ptr + cols.to(tl.int64) * stride, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _load_hidden(x_row, x_stride, residual_row, residual_stride, cols, valid):
    """What is normalised: x, or its sum with the residual as that is stored."""
    hidden = _load_row(x_row, x_stride, cols, valid)
    if residual_row is not None:
        hidden += _load_row(residual_row, residual_stride, cols, valid)
        hidden = cast_output(hidden, residual_row.dtype.element_ty).to(tl.float32)
    return hidden


@triton.jit
def _silu_mul(gate_row, gate_stride, up_row, up_stride, cols, valid):
    """``silu(gate) * up`` in float32."""
    gate = _load_row(gate_row, gate_stride, cols, valid)
    return gate / (1.0 + tl.exp(-gate)) * _load_row(up_row, up_stride, cols, valid)


@triton.jit
def _magnitude_bits(y):
    """Bits of ``|y|``: as integers they keep its order, with NaN above infinity."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _store_codes(data_row, y, scale, cols, valid, FORMAT: tl.constexpr):
    code = _encode(_divide(y, scale), data_row.dtype.element_ty, FORMAT)
    tl.store(data_row + cols, code, mask=valid)


@triton.jit
def _store_groups(
    data_row, scale_row, scale_stride, y, groups, num_groups, cols, valid,
    MAX: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Quantise a [GROUPS, PADDED] tile that holds whole groups."""
    scale = _scale_of(tl.max(_magnitude_bits(y), axis=1), MAX)
    _store_codes(data_row, y, scale[:, None], cols, valid, FORMAT)
    places = scale_row + groups.to(tl.int64) * scale_stride
    tl.store(places, scale, mask=groups < num_groups)


@triton.jit
def _columns(groups, k, GROUP: tl.constexpr, PADDED: tl.constexpr):
    """Columns [GROUPS, PADDED] of these groups, and which of them exist."""
    within = tl.arange(0, PADDED)
    cols = groups[:, None] * GROUP + within[None, :]
    valid = cols < k
    if GROUP != PADDED:
        valid &= (within < GROUP)[None, :]
    return cols, valid


@triton.jit(do_not_specialize=["scale_stride_group", "eps"])
def _rms_norm_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    data_ptr,
    scale_ptr,
    total_ptr,
    k,
    eps,
    x_stride_row,
    x_stride_col,
    residual_stride_row,
    residual_stride_col,
    weight_stride,
    data_stride_row,
    scale_stride_row,
    scale_stride_group,
    total_stride_row,
    total_stride_col,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_ROW: tl.constexpr,  # groups are mere parts of a row, which has one scale
    SINGLE_PASS: tl.constexpr,
    MAX: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    num_groups = tl.cdiv(k, GROUP)
    x_row = x_ptr + row * x_stride_row
    data_row = data_ptr + row * data_stride_row
    scale_row = scale_ptr + row * scale_stride_row
    residual_row = residual_ptr
    if residual_ptr is not None:
        residual_row += row * residual_stride_row
        total_row = total_ptr + row * total_stride_row

    if SINGLE_PASS:
        groups = tl.arange(0, GROUPS)
        cols, valid = _columns(groups, k, GROUP, PADDED)
        hidden = _load_hidden(x_row, x_stride_col, residual_row, residual_stride_col, cols, valid)
        if residual_ptr is not None:
            sums = cast_output(hidden, total_ptr.dtype.element_ty)
            tl.store(total_row + cols.to(tl.int64) * total_stride_col, sums, mask=valid)
        factor = tl.rsqrt(tl.sum(tl.sum(hidden * hidden, axis=1), axis=0) / k + eps)
        y = hidden * _load_row(weight_ptr, weight_stride, cols, valid) * factor
        _store_groups(
            data_row, scale_row, scale_stride_group, y, groups, num_groups, cols, valid,
            MAX, FORMAT,
        )  # fmt: skip
    else:
        squares = tl.zeros((GROUPS, PADDED), tl.float32)
        largest = tl.zeros((GROUPS, PADDED), tl.int32)
        for first in range(0, num_groups, GROUPS):
            cols, valid = _columns(first + tl.arange(0, GROUPS), k, GROUP, PADDED)
            hidden = _load_hidden(
                x_row, x_stride_col, residual_row, residual_stride_col, cols, valid
            )
            if residual_ptr is not None:
                sums = cast_output(hidden, total_ptr.dtype.element_ty)
                tl.store(total_row + cols.to(tl.int64) * total_stride_col, sums, mask=valid)
            squares += hidden * hidden
            if PER_ROW:
                product = hidden * _load_row(weight_ptr, weight_stride, cols, valid)
                largest = tl.maximum(largest, _magnitude_bits(product))
        factor = tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / k + eps)
        if PER_ROW:
            amax = tl.max(largest, axis=1).to(tl.float32, bitcast=True) * factor  # [1]
            row_scale = _scale_of(_magnitude_bits(amax), MAX)
            tl.store(scale_row + tl.arange(0, 1), row_scale)
        for first in range(0, num_groups, GROUPS):
            groups = first + tl.arange(0, GROUPS)
            cols, valid = _columns(groups, k, GROUP, PADDED)
            hidden = _load_hidden(
                x_row, x_stride_col, residual_row, residual_stride_col, cols, valid
            )
            y = hidden * _load_row(weight_ptr, weight_stride, cols, valid) * factor
            if PER_ROW:
                _store_codes(data_row, y, row_scale[:, None], cols, valid, FORMAT)
            else:
                _store_groups(
                    data_row, scale_row, scale_stride_group, y, groups, num_groups, cols, valid,
                    MAX, FORMAT,
                )  # fmt: skip


@triton.jit(do_not_specialize=["scale_stride_group"])
def _silu_mul_quantize_kernel(
    gate_ptr,
    up_ptr,
    data_ptr,
    scale_ptr,
    k,
    parts,
    gate_stride_row,
    gate_stride_col,
    up_stride_row,
    up_stride_col,
    data_stride_row,
    scale_stride_row,
    scale_stride_group,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    SINGLE_PASS: tl.constexpr,  # False: one scale for a row that is read twice
    MAX: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """GROUPS groups of one row, or the whole row in chunks."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    num_groups = tl.cdiv(k, GROUP)
    gate_row = gate_ptr + row * gate_stride_row
    up_row = up_ptr + row * up_stride_row
    data_row = data_ptr + row * data_stride_row
    scale_row = scale_ptr + row * scale_stride_row
    if SINGLE_PASS:
        groups = (tl.program_id(0) % parts) * GROUPS + tl.arange(0, GROUPS)
        cols, valid = _columns(groups, k, GROUP, PADDED)
        y = _silu_mul(gate_row, gate_stride_col, up_row, up_stride_col, cols, valid)
        _store_groups(
            data_row, scale_row, scale_stride_group, y, groups, num_groups, cols, valid,
            MAX, FORMAT,
        )  # fmt: skip
    else:
        largest = tl.zeros((1, PADDED), tl.int32)
        for first in range(num_groups):
            cols, valid = _columns(first + tl.arange(0, 1), k, GROUP, PADDED)
            y = _silu_mul(gate_row, gate_stride_col, up_row, up_stride_col, cols, valid)
            largest = tl.maximum(largest, _magnitude_bits(y))
        row_scale = _scale_of(tl.max(largest, axis=1), MAX)
        tl.store(scale_row + tl.arange(0, 1), row_scale)
        for first in range(num_groups):
            cols, valid = _columns(first + tl.arange(0, 1), k, GROUP, PADDED)
            y = _silu_mul(gate_row, gate_stride_col, up_row, up_stride_col, cols, valid)
            _store_codes(data_row, y, row_scale[:, None], cols, valid, FORMAT)
