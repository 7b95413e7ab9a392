"""DeepGEMM's contiguous layout: all rows in one matrix, each expert's from a whole tile on."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch

from fp8dispatch.backends.compute.operands import on_device
from fp8dispatch.backends.library import Warmed
from fp8dispatch.errors import BackendUnavailableError
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
    library = import_module("deep_gemm")
    _check_tile(library)
    gemm: Callable[..., None] = getattr(library, CONTIGUOUS)
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


def _check_tile(library: ModuleType) -> None:
    """Rows of a tile are of one expert only while the library's tile fits ours.

    Raises:
        BackendUnavailableError: this process has set another alignment in the library.
    """
    stated = getattr(library, "get_mk_alignment_for_contiguous_layout", None)
    rows = TILE_ROWS if stated is None else int(stated())
    if TILE_ROWS % rows:
        raise BackendUnavailableError(
            f"deepgemm needs a contiguous layout with tiles of {TILE_ROWS} rows or a part of that, "
            f"found an alignment of {rows}; set it back in deep_gemm, or exclude the backend"
        )
