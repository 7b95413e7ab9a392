"""Gradients of expert matmuls: of the rows, through dequantised weights, and of the biases.

Only experts that have rows are dequantised, tile by tile in the kernels and in strips of columns
in plain torch; never all of them. Sums have a fixed order: two runs give the same bits.
"""

from __future__ import annotations

import torch

from fp8dispatch import dequantized_grad
from fp8dispatch.formats import dtype_name
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.routing import Routing, expert_rows, sort_ids
from fp8dispatch.moe.scales import kernel_scale
from fp8dispatch.probes.device import runs_kernels


def grad_input(
    grad: torch.Tensor,
    weights: ExpertWeights,
    routing: Routing,
    *,
    use_kernels: bool | None = None,
) -> torch.Tensor:
    """dX [T, K] of dY [rows, N], in dY's dtype; a row of X sums over its uses in fp32.

    Args:
        use_kernels: run the Triton kernels or plain torch; None means the kernels on a GPU that
            they run on.
    """
    if use_kernels is None:
        use_kernels = runs_kernels(grad.device)
    shape = (routing.inputs, weights.data.shape[2])
    if routing.rows == 0 or routing.inputs == 0:
        return torch.zeros(shape, dtype=grad.dtype, device=grad.device)
    if use_kernels:
        return _grad_input_kernels(grad, weights, routing)
    dtype = grad.dtype if routing.gather is None else torch.float32
    out = torch.zeros(shape, dtype=dtype, device=grad.device)
    sorted_rows = routing.sort(use_kernels=False)
    for expert, _, source, target in expert_rows(sorted_rows, routing.inputs):
        rows = dequantized_grad.grad_input(
            grad[target], weights.data[expert], weights.scale[expert], weights.recipe
        )
        if routing.gather is None:
            out[source] = rows
        else:
            _add_rows(out, source, rows.float())
    return out.to(grad.dtype)


def _grad_input_kernels(
    grad: torch.Tensor, weights: ExpertWeights, routing: Routing
) -> torch.Tensor:
    from fp8dispatch.kernels import experts_backward

    sorted_rows = routing.sort(use_kernels=True)
    inputs, k = routing.inputs, weights.data.shape[2]
    uses = inputs if sorted_rows.distinct else routing.rows
    rows = torch.empty((uses, k), dtype=grad.dtype, device=grad.device)
    experts_backward.grad_input(
        grad,
        weights.data,
        kernel_scale(weights),
        rows,
        weights.recipe.block_size,
        sorted_rows,
        inputs,
        scattered=sorted_rows.distinct,
    )
    if sorted_rows.distinct or sorted_rows.gather is None:
        return rows
    return sum_uses(rows, sorted_rows.gather, inputs, use_kernels=True)


def sum_uses(
    rows: torch.Tensor, gather: torch.Tensor, inputs: int, *, use_kernels: bool | None = None
) -> torch.Tensor:
    """[inputs, K]: for each row of X the sum of its uses' rows [S, K], in fp32 and a fixed order.

    Args:
        gather: [S] integers, row of X of each use; those out of range are nobody's.
        use_kernels: as in `grad_input`.
    """
    if use_kernels is None:
        use_kernels = runs_kernels(rows.device)
    if use_kernels and rows.numel():
        from fp8dispatch.kernels import experts_backward

        order, ends = sort_ids(gather, inputs, use_kernels=True)
        out = torch.empty((inputs, rows.shape[1]), dtype=rows.dtype, device=rows.device)
        experts_backward.sum_rows(rows, order, ends, out)
        return out
    places = gather.long()
    places = torch.where((places >= 0) & (places < inputs), places, inputs)  # one row for nobody
    total = torch.zeros((inputs + 1, rows.shape[1]), dtype=torch.float32, device=rows.device)
    _add_rows(total, places, rows.float())
    return total[:inputs].to(rows.dtype)


def _add_rows(total: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> None:
    if total.is_cuda:  # there the sum over equal rows has a fixed order, and index_add has not
        total.index_put_((places,), rows, accumulate=True)
    else:
        total.index_add_(0, places, rows)


def sentence(device: torch.device, dtype: torch.dtype) -> str:
    """How dX goes through the dequantised weights, for a dY of this dtype."""
    how = "a Triton kernel" if runs_kernels(device) else "strips and torch.mm"
    return f"through the dequantised weights in {dtype_name(dtype)}, by {how}"


def grad_bias(
    grad: torch.Tensor,
    routing: Routing,
    dtype: torch.dtype,
    *,
    use_kernels: bool | None = None,
) -> torch.Tensor:
    """dBias [E, N] of dY [rows, N]: the sum over the rows of each expert, in fp32."""
    if use_kernels is None:
        use_kernels = runs_kernels(grad.device)
    out = torch.zeros((routing.experts, grad.shape[1]), dtype=dtype, device=grad.device)
    if routing.rows == 0:
        return out
    sorted_rows = routing.sort(use_kernels=use_kernels)
    if use_kernels:
        from fp8dispatch.kernels import experts_backward

        experts_backward.grad_bias(grad, out, sorted_rows, routing.inputs)
        return out
    for expert, _, _, target in expert_rows(sorted_rows, routing.inputs):
        out[expert] = grad[target].sum(0, dtype=torch.float32)
    return out
