"""The computation of `fp8dispatch.moe.backends.deepgemm`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from fp8dispatch.backends.compute.operands import on_device
from fp8dispatch.backends.library import GROUP
from fp8dispatch.moe.aligned import align_rows
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.deepgemm import ENTRY, TILE_ROWS, DeepGemm
from fp8dispatch.moe.routing import Routing
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.quantization import dynamic
from fp8dispatch.recipe import ceil_div


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
    gemm: Callable[..., None] = getattr(import_module("deep_gemm"), ENTRY)
    n, k, rows = problem.n, problem.k, routing.rows
    static = None if activation_scale is None else activation_scale[:1]
    data, scale = dynamic.quantize(x, GROUP, torch.float8_e4m3fn, static)
    places = align_rows(routing.sort(use_kernels=x.is_cuda), routing.inputs, TILE_ROWS)
    count = places.expert.shape[0]
    out = torch.zeros((rows + 1, n), dtype=torch.bfloat16, device=x.device)
    if routing.inputs == 0:
        return out[:rows]
    # Bytes are indexed, since torch has no indexing for every FP8 dtype everywhere.
    placed = data.view(torch.uint8)[places.source].view(data.dtype)
    groups = ceil_div(k, GROUP)
    placed_scale = torch.empty((groups, count), dtype=torch.float32, device=x.device).t()
    placed_scale.copy_(scale.expand(data.shape[0], groups)[places.source])
    computed = torch.empty((count, n), dtype=torch.bfloat16, device=x.device)

    def call() -> torch.Tensor:
        gemm(
            (placed, placed_scale),
            (weights.data, weights.scale),
            computed,
            places.expert,
            disable_ue8m0_cast=True,
        )
        return computed

    with on_device(x):
        self.warmed.run((count, n, k), x.device, call)
    # Places without a row go to one row more than there are, which is not returned.
    out.index_copy_(0, places.target, computed)
    return out[:rows]
