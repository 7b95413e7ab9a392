"""DeepGEMM's masked layout: a block of places for each expert, whose first ones hold rows."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from fp8dispatch.backends.compute.operands import on_device
from fp8dispatch.backends.library import Warmed
from fp8dispatch.kernels.sorted_rows import SortedRows
from fp8dispatch.moe.aligned import mask_rows
from fp8dispatch.moe.backends.compute.places import brought_back, gathered
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.deepgemm import MASKED
from fp8dispatch.recipe import ceil_div


def run(
    warmed: Warmed,
    data: torch.Tensor,
    scale: torch.Tensor,
    weights: ExpertWeights,
    sorted_rows: SortedRows,
    room: int,
) -> torch.Tensor:
    """Multiply quantised rows [T, K], scales [T, groups], by the weights of their experts.

    Args:
        room: places of each expert, no fewer than there are rows.

    Returns:
        [rows, N] bf16; rows of no expert are zero.
    """
    gemm: Callable[..., None] = getattr(import_module("deep_gemm"), MASKED)
    masked = mask_rows(sorted_rows, data.shape[0])
    (experts, n, k), groups, device = weights.data.shape, scale.shape[1], data.device
    # Rows of no expert go behind the last block. Places without a row are left as they are: what a
    # tile computes of them stays in their own rows, which nobody reads.
    slot = masked.expert * room + masked.place
    count = experts * room
    held = torch.empty((count + 1, k), dtype=torch.uint8, device=device)
    held.index_copy_(0, slot, gathered(data, masked.source).view(torch.uint8))
    held_scale = torch.empty((experts + 1, groups, room), dtype=torch.float32, device=device)
    held_scale[masked.expert, :, masked.place] = scale[masked.source]
    computed = torch.empty((count + 1, n), dtype=torch.bfloat16, device=device)
    expected = ceil_div(sorted_rows.rows, experts)

    def call() -> torch.Tensor:
        gemm(
            (held[:count].view(data.dtype).view(experts, room, k), held_scale[:-1].transpose(1, 2)),
            (weights.data, weights.scale),
            computed[:count].view(experts, room, n),
            masked.counts,
            expected,
            disable_ue8m0_cast=True,
        )
        return computed

    with on_device(data):
        warmed.run((MASKED, experts, room, expected, n, k), device, call)
    return brought_back(computed[slot], masked.target, sorted_rows.rows)
