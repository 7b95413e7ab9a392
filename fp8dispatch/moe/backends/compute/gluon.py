"""The computation of `fp8dispatch.moe.backends.gluon`."""

from __future__ import annotations

from importlib import import_module

import torch

from fp8dispatch.backends.compute.operands import aligned
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.gluon import Gluon
from fp8dispatch.moe.routing import Routing
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.recipe import Granularity


def experts(
    self: Gluon,
    x: torch.Tensor,
    weights: ExpertWeights,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    routing: Routing,
    problem: ExpertsProblem,
) -> torch.Tensor:
    self.require(weights.recipe)
    # Not above, where a Gluon that does not import would hide the refusal that says so.
    kernels = import_module("fp8dispatch.kernels.hopper_experts_launch")
    routed = routing.sort(use_kernels=True)
    allocate = torch.empty if routed.complete else torch.zeros
    out = allocate(
        (routing.rows, problem.n), dtype=getattr(torch, problem.out_dtype), device=x.device
    )
    scale = weights.scale
    if weights.recipe.granularity is not Granularity.BLOCK:
        scale = scale.view(scale.shape[0], -1)
    kernels.experts_matmul(
        x,
        activation_scale,
        weights.data,
        aligned(scale),
        None if bias is None else aligned(bias),
        out,
        routed,
    )
    return out
