"""Runs one checked expert matmul without gradients: decode the scales, decide, compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8dispatch import registry
from fp8dispatch.decide import counters, decide, put_aside
from fp8dispatch.formats import activation_float8, dtype_name
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.routing import Routing
from fp8dispatch.policy import Policy
from fp8dispatch.prepare import expert_activation_scale_fp32, expert_scale_fp32
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.recipe import Recipe


@dataclass(frozen=True)
class ExpertsCall:
    """What a call means beside its tensors.

    Attributes:
        recipe: what the scale of each expert means.
        out_dtype: dtype of the output.
        allowed: which backends may run it.
        batched: each row names its expert; else rows come sorted by expert.
        gradient: it computes dX, as `LinearProblem.gradient` says.
    """

    recipe: Recipe
    out_dtype: torch.dtype
    allowed: Policy
    batched: bool
    gradient: bool = False


def route_of(
    inputs: int,
    experts: int,
    index: torch.Tensor,
    gather: torch.Tensor | None,
    scatter: torch.Tensor | None,
    *,
    batched: bool,
) -> Routing:
    """The routing of a call; `index` is its expert ids or its offsets."""
    rows = inputs if gather is None else gather.shape[0]
    ids, offsets = (index, None) if batched else (None, index)
    return Routing(experts, rows, inputs, ids, offsets, gather, scatter)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    gather: torch.Tensor | None,
    scatter: torch.Tensor | None,
    call: ExpertsCall,
) -> torch.Tensor:
    """The computation itself, on checked tensors and without gradients."""
    experts, n, _ = weight.shape
    routing = route_of(x.shape[0], experts, index, gather, scatter, batched=call.batched)
    shape = (routing.rows, n)
    if x.is_meta:
        return torch.empty(shape, dtype=call.out_dtype, device="meta")
    weights = decoded_weights(weight, weight_scale, call.recipe)
    static = None
    if activation_scale is not None:
        static = expert_activation_scale_fp32(activation_scale, experts)
    problem = describe_call(routing, weight, call, bias, activation_scale)
    allowed, failed = call.allowed, set[str]()
    while True:
        decision = decide(problem, x.device, allowed)
        if routing.rows == 0:  # decided all the same: a forced backend that refuses must say so
            return torch.empty(shape, dtype=call.out_dtype, device=x.device)
        backend = registry.load_experts(decision.backend)
        counters.calls += 1
        try:
            return backend.experts(x, weights, bias, static, routing, problem)
        except Exception as raised:
            # Any library's failure: raised where it is the caller's, else another backend's turn.
            allowed = put_aside(raised, decision, x.device, allowed)
            if decision.backend in failed:
                raise
            failed.add(decision.backend)


def decoded_weights(
    weight: torch.Tensor, weight_scale: torch.Tensor, recipe: Recipe
) -> ExpertWeights:
    """The weights with fp32 scales, whose values are checked once and remembered."""
    scale = expert_scale_fp32(weight_scale, recipe, *weight.shape)
    return ExpertWeights(weight, scale, recipe, weight_scale)


def describe_call(
    routing: Routing,
    weight: torch.Tensor,
    call: ExpertsCall,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
) -> ExpertsProblem:
    """The call as plain data."""
    experts, n, k = weight.shape
    static = activation_scale is not None
    strides = weight.stride(0) | weight.stride(1)
    return ExpertsProblem(
        m=routing.rows,
        n=n,
        k=k,
        recipe=call.recipe,
        weight_dtype=dtype_name(weight.dtype),
        activation_dtype=dtype_name(activation_float8(weight.dtype)),
        out_dtype=dtype_name(call.out_dtype),
        has_bias=bias is not None,
        static_activation=static,
        weight_row_major=weight.stride(2) == 1 and weight.stride(1) >= k,
        weight_contiguous=weight.is_contiguous(),
        aligned=weight.is_meta or (weight.data_ptr() | strides) % 16 == 0,
        accuracy=call.allowed.accuracy,
        batch_invariant=call.allowed.batch_invariant,
        experts=experts,
        batched=call.batched,
        gathers=routing.gather is not None,
        scatters=routing.scatter is not None,
        gradient=call.gradient,
        static_per_expert=static and activation_scale is not None and activation_scale.numel() > 1,
    )
