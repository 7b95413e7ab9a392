"""What packing lost: the content of its report; `report_files` makes files of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict

import fp8dispatch
from fp8dispatch.pack.figures import SUSPICIOUS_SQNR, TensorFigures
from fp8dispatch.pack.planned import Plan
from fp8dispatch.pack.scheme import AMAX

REPORT = "fp8_report.json"
WORST = 20


class Totals(BaseModel):
    """All quantised weights together.

    Attributes:
        weights: how many were quantised.
        kept: how many tensors were not.
        values: elements of the quantised weights.
        bytes_before, bytes_after: of all tensors of the model.
        sqnr_db: of all values together; None where nothing was lost.
        lowest_sqnr_db: of the worst weight.
        clipped, zero_blocks: sums over the weights.
        suspicious: weights below `SUSPICIOUS_SQNR`.
    """

    model_config = ConfigDict(extra="forbid")

    weights: int
    kept: int
    values: int
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    lowest_sqnr_db: float | None
    clipped: int
    zero_blocks: int
    suspicious: list[str]


class Report(BaseModel):
    """``fp8_report.json``.

    Attributes:
        version: of this form.
        fp8dispatch: the version that wrote it.
        model_type: of the configuration.
        format: the on-disk format.
        recipe: the recipe's name.
        scales: how they were found, ``"amax"`` or ``"mse"``.
        totals: all weights together.
        worst: names of the weights with the lowest SQNR, the worst first.
        tensors: every quantised weight, in the order of the files.
        activation_saturation: module -> amax of its input over the 99.9th percentile, where a
            calibration was given.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    fp8dispatch: str
    model_type: str | None
    format: str
    recipe: str
    scales: str = AMAX
    totals: Totals
    worst: list[str]
    tensors: list[TensorFigures]
    activation_saturation: dict[str, float]

    @classmethod
    def of(
        cls,
        planned: Plan,
        tensors: Iterable[TensorFigures],
        activation_saturation: Mapping[str, float],
    ) -> Report:
        """The report of a plan that was carried out.

        Args:
            planned: the plan.
            tensors: the figures of its weights.
            activation_saturation: from calibration.
        """
        place = {f"{name}.weight": number for number, name in enumerate(planned.weights)}
        figures = sorted(tensors, key=lambda one: place[one.name])
        lossy = sorted(
            (one for one in figures if one.sqnr_db is not None),
            key=lambda one: (one.sqnr_db or 0.0, one.name),
        )
        config = planned.checkpoint.config or {}
        model_type = config.get("model_type")
        totals = Totals(
            weights=len(figures),
            kept=len(planned.kept),
            values=sum(one.shape[0] * one.shape[1] for one in figures),
            bytes_before=planned.checkpoint.total_bytes,
            bytes_after=planned.bytes_after,
            sqnr_db=_total_sqnr(figures),
            lowest_sqnr_db=lossy[0].sqnr_db if lossy else None,
            clipped=sum(one.clipped for one in figures),
            zero_blocks=sum(one.zero_blocks for one in figures),
            suspicious=[one.name for one in lossy if (one.sqnr_db or 0.0) < SUSPICIOUS_SQNR],
        )
        return cls(
            fp8dispatch=fp8dispatch.__version__,
            model_type=model_type if isinstance(model_type, str) else None,
            format=planned.resolved.layout.name,
            recipe=planned.resolved.recipe,
            scales=planned.resolved.asked.scales,
            totals=totals,
            worst=[one.name for one in lossy[:WORST]],
            tensors=figures,
            activation_saturation={
                name: ratio
                for name, ratio in activation_saturation.items()
                if name in planned.weights and math.isfinite(ratio)
            },
        )


def _total_sqnr(figures: Iterable[TensorFigures]) -> float | None:
    signal = noise = 0.0
    for one in figures:
        signal += one.signal
        noise += one.signal * one.relative_error**2
    return 10 * math.log10(signal / noise) if signal and noise else None
