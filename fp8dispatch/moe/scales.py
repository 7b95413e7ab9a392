"""Scales of expert weights in the layouts that kernels read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8dispatch.recipe import Granularity

if TYPE_CHECKING:
    import torch

    from fp8dispatch.moe.backends.contract import ExpertWeights


def kernel_scale(weights: ExpertWeights) -> torch.Tensor:
    """The scales as our kernels read them: [E, blocks of N, blocks of K], or [E, N, 1]; a view."""
    if weights.recipe.granularity is not Granularity.TENSOR:
        return weights.scale
    experts, n, _ = weights.data.shape
    return weights.scale.reshape(experts, 1, 1).expand(experts, n, 1)
