"""DeepGEMM's contiguous layout: all rows in one matrix, each expert's from a whole tile on."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from fp8dispatch.backends.compute.operands import on_device
from fp8dispatch.backends.library import Warmed
from fp8dispatch.kernels.sorted_rows import SortedRows
from fp8dispatch.moe.aligned import align_rows
from fp8dispatch.moe.backends.compute.places import brought_back, gathered
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.deepgemm import CONTIGUOUS, TILE_ROWS


def run(
    warmed: Warmed,
    data: torch.Tensor,
    scale: torch.Tensor,
    weights: ExpertWeights,
    sorted_rows: SortedRows,
) -> torch.Tensor:
    """Multiply quantised rows [T, K], scales [T, groups], by the weights of their experts.

    Returns:
        [rows, N] bf16; rows of no expert are zero.
    """
    gemm: Callable[..., None] = getattr(import_module("deep_gemm"), CONTIGUOUS)
    places = align_rows(sorted_rows, data.shape[0], TILE_ROWS)
    _, n, k = weights.data.shape
    count, groups = places.expert.shape[0], scale.shape[1]
    placed = gathered(data, places.source)
    placed_scale = torch.empty((groups, count), dtype=torch.float32, device=data.device).t()
    placed_scale.copy_(scale[places.source])
    computed = torch.empty((count, n), dtype=torch.bfloat16, device=data.device)

    def call() -> torch.Tensor:
        gemm(
            (placed, placed_scale),
            (weights.data, weights.scale),
            computed,
            places.expert,
            disable_ue8m0_cast=True,
        )
        return computed

    with on_device(data):
        warmed.run((CONTIGUOUS, count, n, k), data.device, call)
    return brought_back(computed, places.target, sorted_rows.rows)
