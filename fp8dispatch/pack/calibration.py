"""What packing takes from calibration: static activation scales, seeds of histories, KV scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fp8dispatch.calibrate.saturation import saturation
from fp8dispatch.calibrate.scales import activation_scales, amax_seeds, kv_cache_scales
from fp8dispatch.calibrate.stats import CalibrationStats
from fp8dispatch.errors import CheckpointError, FP8DispatchError


@dataclass(frozen=True)
class Calibration:
    """Scales from calibration; all are multipliers, ``value = data * scale``.

    Attributes:
        activation_scales: full module name -> scale of its input, finite and positive. Layers
            that are fused when served should share one; packing takes the largest of them.
        amax_history: module -> largest |input| of past batches, newest first.
        saturation: module -> amax of its input over the 99.9th percentile.
        kv_scales: attention module -> scales of keys and of values, one number for each KV head.
    """

    activation_scales: Mapping[str, float]
    amax_history: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    saturation: Mapping[str, float] = field(default_factory=dict)
    kv_scales: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        for name, scale in self.activation_scales.items():
            if not 0 < scale < float("inf"):
                raise CheckpointError(
                    f"the calibration's scale of {name} must be finite and positive, found "
                    f"{scale}; calibrate again"
                )


def read_calibration(path: Path, dtype: str) -> Calibration:
    """Scales from a file of statistics that ``fp8dispatch calibrate`` wrote.

    Args:
        path: the file.
        dtype: FP8 dtype of the activations, by its torch name.

    Raises:
        CheckpointError: a file that cannot be read, or is of an interrupted calibration.
    """
    try:
        return _scales_of(CalibrationStats.load(path), dtype)
    except FP8DispatchError as error:
        raise CheckpointError(str(error)) from error


def _scales_of(stats: CalibrationStats, dtype: str) -> Calibration:
    """What packing needs of statistics."""
    float8: torch.dtype = getattr(torch, dtype)
    cache = kv_cache_scales(stats, per_head=True, dtype=float8) if stats.kv_cache else {}
    return Calibration(
        activation_scales=activation_scales(stats, dtype=float8),
        amax_history={
            name: seed.amax_history for name, seed in amax_seeds(stats, dtype=float8).items()
        },
        saturation={row.name: row.ratio for row in saturation(stats)},
        kv_scales={
            name: (tuple(found.key.tolist()), tuple(found.value.tolist()))
            for name, found in cache.items()
        },
    )
