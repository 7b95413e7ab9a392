"""The weighted sum of the experts' outputs of each token, and its gradients, a launch each.

    out[t]   = sum over j of  share[t, j] * rows[t * k + j]        for ids that name an expert
    d rows[s]  = share[s] * d out[s // k]
    d share[s] = sum over H of  d out[s // k] * rows[s]

Sums run in fp32 and in the order of the slots, so that they are the same on every run. A slot whose
id names no expert is neither read nor counted, whatever its share is, and gets gradients of zero.
In plain torch the same takes half a dozen launches and fp32 copies of all rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from fp8dispatch.kernels.interpreter import cast_output
from fp8dispatch.kernels.launch import FP_FUSION, ceil_div, next_power_of_2, on_device_of

if TYPE_CHECKING:
    import torch

_WIDEST = 1024  # columns of a program


def combine_rows(
    rows: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, experts: int, out: torch.Tensor
) -> None:
    """Write the weighted sums into `out`.

    Args:
        rows: ``[T k, H]`` bfloat16, float16 or float32, any strides; those of a token together.
        ids: ``[T k]``, any integer dtype and stride.
        shares: ``[T, k]``, a float dtype, any strides.
        experts: ids from 0 to below this one name an expert.
        out: ``[T, H]``, a float dtype, any strides.
    """
    tokens, hidden = out.shape
    if tokens == 0 or hidden == 0:
        return
    width = min(next_power_of_2(hidden), _WIDEST)
    with on_device_of(rows):
        _combine_kernel[(tokens * ceil_div(hidden, width),)](
            rows,
            ids,
            shares,
            out,
            hidden,
            experts,
            rows.stride(0),
            rows.stride(1),
            ids.stride(0),
            shares.stride(0),
            shares.stride(1),
            out.stride(0),
            out.stride(1),
            TOP_K=shares.shape[1],
            WIDTH=width,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )


def combine_rows_backward(
    grad: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    experts: int,
    grad_rows: torch.Tensor,
    grad_shares: torch.Tensor,
) -> None:
    """Write both gradients.

    Args:
        grad: ``[T, H]``, any strides.
        rows, ids, shares, experts: as in `combine_rows`.
        grad_rows: ``[T k, H]`` output, like `rows`.
        grad_shares: ``[T, k]`` output, like `shares`.
    """
    slots, hidden = rows.shape
    if slots == 0:
        return
    with on_device_of(rows):
        _backward_kernel[(slots,)](
            grad,
            rows,
            ids,
            shares,
            grad_rows,
            grad_shares,
            hidden,
            experts,
            grad.stride(0),
            grad.stride(1),
            rows.stride(0),
            rows.stride(1),
            ids.stride(0),
            shares.stride(0),
            shares.stride(1),
            grad_rows.stride(0),
            grad_rows.stride(1),
            grad_shares.stride(0),
            grad_shares.stride(1),
            TOP_K=shares.shape[1],
            WIDTH=min(next_power_of_2(hidden), _WIDEST),
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )


@triton.jit
def _combine_kernel(
    rows_ptr,
    ids_ptr,
    shares_ptr,
    out_ptr,
    hidden,
    experts,
    rows_stride,
    rows_stride_h,
    ids_stride,
    shares_stride,
    shares_stride_k,
    out_stride,
    out_stride_h,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WIDTH columns of one token."""
    pieces = tl.cdiv(hidden, WIDTH)
    token = (tl.program_id(0) // pieces).to(tl.int64)
    cols = ((tl.program_id(0) % pieces) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    for slot in range(TOP_K):
        row = token * TOP_K + slot
        one = tl.load(ids_ptr + row * ids_stride).to(tl.int64)
        known = (one >= 0) & (one < experts)
        share = tl.load(shares_ptr + token * shares_stride + slot * shares_stride_k)
        value = tl.load(
            rows_ptr + row * rows_stride + cols * rows_stride_h,
            mask=cols < tl.where(known, hidden, 0),
            other=0.0,
        )
        total += value.to(tl.float32) * tl.where(known, share.to(tl.float32), 0.0)
    tl.store(
        out_ptr + token * out_stride + cols * out_stride_h,
        cast_output(total, out_ptr.dtype.element_ty),
        mask=cols < hidden,
    )


@triton.jit
def _backward_kernel(
    grad_ptr,
    rows_ptr,
    ids_ptr,
    shares_ptr,
    grad_rows_ptr,
    grad_shares_ptr,
    hidden,
    experts,
    grad_stride,
    grad_stride_h,
    rows_stride,
    rows_stride_h,
    ids_stride,
    shares_stride,
    shares_stride_k,
    grad_rows_stride,
    grad_rows_stride_h,
    grad_shares_stride,
    grad_shares_stride_k,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One slot: all of its row, and its share."""
    row = tl.program_id(0).to(tl.int64)
    token, slot = row // TOP_K, row % TOP_K
    one = tl.load(ids_ptr + row * ids_stride).to(tl.int64)
    known = (one >= 0) & (one < experts)
    share = tl.load(shares_ptr + token * shares_stride + slot * shares_stride_k)
    share = tl.where(known, share.to(tl.float32), 0.0)
    read = tl.where(known, hidden, 0)
    product = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, hidden, WIDTH):
        cols = (first + tl.arange(0, WIDTH)).to(tl.int64)
        inside = cols < hidden
        grad = tl.load(
            grad_ptr + token * grad_stride + cols * grad_stride_h, mask=cols < read, other=0.0
        ).to(tl.float32)
        value = tl.load(
            rows_ptr + row * rows_stride + cols * rows_stride_h, mask=cols < read, other=0.0
        )
        product += grad * value.to(tl.float32)
        tl.store(
            grad_rows_ptr + row * grad_rows_stride + cols * grad_rows_stride_h,
            cast_output(grad * share, grad_rows_ptr.dtype.element_ty),
            mask=inside,
        )
    tl.store(
        grad_shares_ptr + token * grad_shares_stride + slot * grad_shares_stride_k,
        cast_output(tl.sum(product, 0), grad_shares_ptr.dtype.element_ty),
    )
