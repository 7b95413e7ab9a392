"""The computation of `fp8dispatch.moe.backends.fbgemm_family`."""

from __future__ import annotations

import torch

from fp8dispatch.backends.compute.fbgemm_family import check_operand
from fp8dispatch.backends.compute.operands import on_device
from fp8dispatch.backends.library import GROUP
from fp8dispatch.moe.aligned import AlignedRows, align_rows, scales_by_expert
from fp8dispatch.moe.backends.compute.places import brought_back, gathered, row_scales
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.fbgemm_family import ROW_MULTIPLE, FbgemmFamilyExperts
from fp8dispatch.moe.routing import Routing
from fp8dispatch.moe.scales import spread_rows
from fp8dispatch.prepare import prepared
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.quantization import dynamic
from fp8dispatch.recipe import Granularity


def experts(
    self: FbgemmFamilyExperts,
    x: torch.Tensor,
    weights: ExpertWeights,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    routing: Routing,
    problem: ExpertsProblem,
) -> torch.Tensor:
    self.require(weights.recipe)
    operator = self.operator(weights.recipe)
    assert operator is not None  # `require` has found it
    n, k = problem.n, problem.k
    if routing.inputs == 0:
        return torch.zeros((routing.rows, n), dtype=torch.bfloat16, device=x.device)
    static = None if activation_scale is None else activation_scale[:1]
    data, scale = dynamic.quantize(x, weights.recipe.group_size(k), torch.float8_e4m3fn, static)
    places = align_rows(routing.sort(use_kernels=x.is_cuda), routing.inputs, ROW_MULTIPLE)
    placed, count = gathered(data, places.source), places.source.shape[0]
    layout = _block_scales if weights.recipe.granularity is Granularity.BLOCK else _row_scales
    x_scale, weight_scale, x_shape, weight_shape = layout(scale, weights, places)
    # Whatever is wrong here would be computed all the same, or end the CUDA context.
    check_operand("activations", placed, (count, k), torch.float8_e4m3fn)
    check_operand("weights", weights.data, (problem.experts, n, k), torch.float8_e4m3fn)
    check_operand("activation scales", x_scale, x_shape, torch.float32)
    check_operand("weight scales", weight_scale, weight_shape, torch.float32)
    check_operand("sizes", places.sizes, (problem.experts,), torch.int64)
    with on_device(x):
        computed = operator(placed, weights.data, x_scale, weight_scale, places.sizes)
    return brought_back(computed, places.target, routing.rows)


# Scales of the activations and of the weights, and the shapes that both must have.
_Scales = tuple[torch.Tensor, torch.Tensor, tuple[int, ...], tuple[int, ...]]


def _block_scales(scale: torch.Tensor, weights: ExpertWeights, places: AlignedRows) -> _Scales:
    """Activation scales of one expert behind those of another, each group by group."""
    count, (experts, n, k) = places.source.shape[0], weights.data.shape
    groups, blocks = k // GROUP, n // GROUP
    weight_scale = prepared(
        weights.scale_source,
        ("fbgemm", "experts"),
        lambda: weights.scale.transpose(1, 2).clone(memory_format=torch.contiguous_format),
    )
    x_scale = scales_by_expert(scale, places, groups)
    return x_scale, weight_scale, (count * groups,), (experts, groups, blocks)


def _row_scales(scale: torch.Tensor, weights: ExpertWeights, places: AlignedRows) -> _Scales:
    experts, n, _ = weights.data.shape
    return row_scales(scale, places.source), spread_rows(weights), places.source.shape, (experts, n)
