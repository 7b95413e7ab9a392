"""The computation of `fp8dispatch.moe.backends.triton`."""

from __future__ import annotations

from dataclasses import replace

import torch

from fp8dispatch.formats import activation_float8
from fp8dispatch.kernels.experts_gemm import MOST_NAMED_ROWS, experts_gemm
from fp8dispatch.kernels.experts_quantize import quantize_sorted_static
from fp8dispatch.kernels.sorted_rows import NamedRows, SortedRows
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.triton import Triton
from fp8dispatch.moe.routing import Routing
from fp8dispatch.moe.scales import kernel_scale
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.quantization import dynamic


def experts(
    self: Triton,
    x: torch.Tensor,
    weights: ExpertWeights,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    routing: Routing,
    problem: ExpertsProblem,
) -> torch.Tensor:
    dtype = getattr(torch, problem.out_dtype)
    routed: SortedRows | NamedRows
    if activation_scale is not None and problem.static_per_expert:
        sorted_rows = routing.sort(use_kernels=True)
        data, scale, routed = _quantize_for_each(x, weights, activation_scale, sorted_rows)
        complete = routed.complete
    else:
        data, scale = dynamic.quantize(
            x,
            weights.recipe.group_size(problem.k),
            activation_float8(weights.data.dtype),
            None if activation_scale is None else activation_scale[:1],
            use_kernels=True,
        )
        ids = routing.expert_ids
        if ids is not None and routing.rows <= MOST_NAMED_ROWS:
            routed, complete = NamedRows(ids, routing.rows, routing.gather), True
        else:
            routed = routing.sort(use_kernels=True)
            complete = routed.complete
    allocate = torch.empty if complete else torch.zeros
    out = allocate((routing.rows, problem.n), dtype=dtype, device=x.device)
    weight_scale = kernel_scale(weights)
    scale = scale.expand(data.shape[0], weight_scale.shape[2])
    block = weights.recipe.block_size
    experts_gemm(data, scale, weights.data, weight_scale, bias, out, block, routed)
    return out


def _quantize_for_each(
    x: torch.Tensor, weights: ExpertWeights, scale: torch.Tensor, sorted_rows: SortedRows
) -> tuple[torch.Tensor, torch.Tensor, SortedRows]:
    """Rows gathered and divided by the scale of their own expert, [rows, K]; their scales."""
    rows, inputs, gather = sorted_rows.rows, x.shape[0], sorted_rows.gather
    dtype = activation_float8(weights.data.dtype)
    data = torch.empty((rows, x.shape[1]), dtype=dtype, device=x.device)
    row_scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    quantize_sorted_static(x, scale, data, row_scale.view(-1), sorted_rows)
    if gather is not None:  # what led nowhere still does
        places = torch.arange(rows, device=x.device)
        gather = torch.where((gather >= 0) & (gather < inputs), places, -1)
    return data, row_scale, replace(sorted_rows, gather=gather)
