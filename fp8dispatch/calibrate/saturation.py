"""Which layers a static scale would harm: their largest input lies far above all the others.

E4M3 holds about 18 octaves, of which the lower three lose bits. Where one value of 2893 sets the
scale of inputs whose 99.9th percentile is 1.2, everything but that value is squeezed into the
lower octaves, or below the smallest code.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from fp8dispatch.calibrate.methods import amax_by
from fp8dispatch.calibrate.scales import unobserved
from fp8dispatch.calibrate.stats import CalibrationStats, ModuleRecord
from fp8dispatch.quantization.eager import scale_of

Level = Literal["fine", "outliers", "sensitive"]

OUTLIER_RATIO = 64.0
SENSITIVE_RATIO = 1000.0
SPIKE_RATIO = 16.0

_SMALLEST_CODE = 2.0**-9  # of E4M3


@dataclass(frozen=True)
class SaturationRow:
    """One layer's inputs, seen from a static scale per tensor in E4M3.

    Attributes:
        name: of the layer.
        amax: the largest magnitude.
        p99, p99_9, p99_99: percentiles of the magnitude.
        ratio: amax over the 99.9th percentile; infinity where that is zero.
        clipped: share of the values that the percentile of the statistics would clip.
        underflow: share of the values, zeros aside, that the scale amax / 448 puts below the
            smallest code, 2 ** -9.
        spike: the largest amax of a call over the median of all calls; 1 without a history.
        level: ``"fine"``; ``"outliers"`` above a ratio of 64; ``"sensitive"`` above 1000.
        proposal: what to do about it, empty where it is fine.
    """

    name: str
    amax: float
    p99: float
    p99_9: float
    p99_99: float
    ratio: float
    clipped: float
    underflow: float
    spike: float
    level: Level
    proposal: str


def saturation(stats: CalibrationStats) -> list[SaturationRow]:
    """A row for each layer that was reached, the largest ratio first."""
    rows = [
        _row(name, record, stats.percentile)
        for name, record in stats.modules.items()
        if record.values
    ]
    return sorted(rows, key=lambda row: -row.ratio)


def sensitive_layers(stats: CalibrationStats) -> tuple[str, ...]:
    """Names of the layers that had better keep their dtype or take one scale per token."""
    return tuple(row.name for row in saturation(stats) if row.level == "sensitive")


def findings(stats: CalibrationStats) -> list[str]:
    """What a user must know of these statistics, a sentence each; empty where all is fine."""
    found = [
        f"{row.name}: the largest input is {row.amax:.4g}, {row.ratio:.4g} times the 99.9th "
        f"percentile ({row.p99_9:.4g}); {row.proposal}"
        for row in saturation(stats)
        if row.level != "fine"
    ]
    for name, record in stats.modules.items():
        if record.nonfinite:
            found.append(
                f"{name}: {record.nonfinite} inputs were NaN or infinite and count for nothing; "
                f"calibrate in a wider dtype"
            )
        if record.unmasked_calls:
            found.append(
                f"{name}: padding could not be told from tokens in {record.unmasked_calls} of "
                f"{record.calls} calls; calibrate with a batch size of 1"
            )
        spike = _spike(record)
        if spike > SPIKE_RATIO:
            found.append(
                f"{name}: one call has {spike:.4g} times the amax of the median call; calibrate "
                f"on more samples, so that the scale does not rest on one of them"
            )
    idle = unobserved(stats)
    if idle.experts:
        found.append(
            f"{len(idle.experts)} expert layers were never routed to ({_some(idle.experts)}) and "
            f"borrow the largest scale of their peers; calibrate on more samples"
        )
    if idle.layers:
        found.append(
            f"{len(idle.layers)} layers were never called ({_some(idle.layers)}) and have no "
            f"static scale; leave them unquantised or use dynamic activations"
        )
    return found


def _row(name: str, record: ModuleRecord, percentile: float) -> SaturationRow:
    magnitudes = record.magnitudes()
    p99, p99_9, p99_99 = (magnitudes.percentile(q) for q in (99.0, 99.9, 99.99))
    ratio = record.amax / p99_9 if p99_9 else float("inf") if record.amax else 1.0
    limit = amax_by("percentile", magnitudes, percentile=percentile)
    scale = float(scale_of(torch.tensor(record.amax), torch.float8_e4m3fn))
    level: Level = "fine"
    proposal = ""
    if ratio > SENSITIVE_RATIO:
        level = "sensitive"
        proposal = "keep it unquantised (--skip) or use one scale per token (dynamic activations)"
    elif ratio > OUTLIER_RATIO:
        level = "outliers"
        proposal = "use one scale per token (dynamic activations) or per group of columns"
    return SaturationRow(
        name=name,
        amax=record.amax,
        p99=p99,
        p99_9=p99_9,
        p99_99=p99_99,
        ratio=ratio,
        clipped=magnitudes.share_above(limit),
        underflow=magnitudes.share_lost_below(_SMALLEST_CODE * scale),
        spike=_spike(record),
        level=level,
        proposal=proposal,
    )


def _spike(record: ModuleRecord) -> float:
    usual = median(record.amax_history) if record.amax_history else 0.0
    return max(record.amax_history) / usual if usual else 1.0


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
