"""The weighted sum over the experts of each token, with gradients for rows and weights."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.function import once_differentiable

from fp8dispatch.checks import is_traced
from fp8dispatch.probes.device import runs_kernels


def combine(
    rows: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``out[t] = sum over j of shares[t, j] * rows[t k + j]``, in fp32 and then `dtype`.

    Args:
        rows: [T k, H] bfloat16, float16 or float32.
        ids: [T k] integers; a slot whose id is below 0 or from `experts` on does not count,
            whatever its share is (NaN included), and takes no gradient.
        shares: [T, k] in a float dtype.

    Returns:
        [T, H] in `dtype`.
    """
    transformed = peek_interpreter_stack() is not None
    if is_traced(rows, shares) or transformed or not runs_kernels(rows.device):
        return combine_eager(rows, ids, shares, experts, dtype)
    if torch.is_grad_enabled() and (rows.requires_grad or shares.requires_grad):
        out: torch.Tensor = _Combine.apply(rows, ids, shares, experts, dtype)  # type: ignore[no-untyped-call]
        return out
    return _combine(rows, ids, shares, experts, dtype)


def combine_eager(
    rows: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, experts: int, dtype: torch.dtype
) -> torch.Tensor:
    """The same in plain torch: what runs without kernels, and what a compiler fuses."""
    tokens, top_k = shares.shape
    wide = ids.long()  # in 8 bits it could not be compared with the number of experts
    known = ((wide >= 0) & (wide < experts)).view(tokens, top_k)
    counted = torch.where(known, shares.float(), 0.0).unsqueeze(-1)
    return (rows.view(tokens, top_k, rows.shape[1]) * counted).sum(1, dtype=torch.float32).to(dtype)


def _combine(
    rows: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, experts: int, dtype: torch.dtype
) -> torch.Tensor:
    # Imported here because it imports Triton, which is not a requirement of the package.
    from fp8dispatch.kernels.combine_experts import combine_rows

    out = torch.empty((shares.shape[0], rows.shape[1]), dtype=dtype, device=rows.device)
    combine_rows(rows, ids, shares, experts, out)
    return out


class _Combine(torch.autograd.Function):
    """`_combine`, which saves the rows (for the shares' gradient) and the shares."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        ids: torch.Tensor,
        shares: torch.Tensor,
        experts: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, ids, shares)
        ctx.experts = experts
        return _combine(rows, ids, shares, experts, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from fp8dispatch.kernels.combine_experts import combine_rows_backward

        rows, ids, shares = ctx.saved_tensors
        grad_rows, grad_shares = torch.empty_like(rows), torch.empty_like(shares)
        combine_rows_backward(grad, rows, ids, shares, ctx.experts, grad_rows, grad_shares)
        return grad_rows, None, grad_shares, None, None
