"""Scales of expert weights in the layouts that kernels read."""

from __future__ import annotations

import torch

from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.prepare import prepared
from fp8dispatch.recipe import Granularity


def kernel_scale(weights: ExpertWeights) -> torch.Tensor:
    """The scales as our kernels read them: [E, blocks of N, blocks of K], or [E, N, 1]; a view."""
    if weights.recipe.granularity is not Granularity.TENSOR:
        return weights.scale
    experts, n, _ = weights.data.shape
    return weights.scale.reshape(experts, 1, 1).expand(experts, n, 1)


def spread_rows(weights: ExpertWeights) -> torch.Tensor:
    """Per-row scales, or those per tensor repeated, as a contiguous [E, N]; made once."""
    experts, n, _ = weights.data.shape

    def build() -> torch.Tensor:
        scale = weights.scale.reshape(experts, -1).expand(experts, n)
        return scale.clone(memory_format=torch.contiguous_format)

    return prepared(weights.scale_source, ("experts", "rows", n), build)
