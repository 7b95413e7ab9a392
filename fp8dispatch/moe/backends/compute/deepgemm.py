"""The computation of `fp8dispatch.moe.backends.deepgemm`: one module for each layout."""

from __future__ import annotations

import torch

from fp8dispatch.backends.library import GROUP
from fp8dispatch.moe.backends.compute import deepgemm_contiguous, deepgemm_masked
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.deepgemm import DeepGemm, masked_rows
from fp8dispatch.moe.routing import Routing
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.quantization import dynamic


def experts(
    self: DeepGemm,
    x: torch.Tensor,
    weights: ExpertWeights,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    routing: Routing,
    problem: ExpertsProblem,
) -> torch.Tensor:
    self.require(weights.recipe)
    if routing.inputs == 0:
        return torch.zeros((routing.rows, problem.n), dtype=torch.bfloat16, device=x.device)
    static = None if activation_scale is None else activation_scale[:1]
    data, scale = dynamic.quantize(x, GROUP, torch.float8_e4m3fn, static)
    scale = scale.expand(data.shape[0], weights.scale.shape[2])
    sorted_rows = routing.sort(use_kernels=x.is_cuda)
    room = masked_rows(problem)
    if room is None:
        return deepgemm_contiguous.run(self.warmed, data, scale, weights, sorted_rows)
    return deepgemm_masked.run(self.warmed, data, scale, weights, sorted_rows, room)
