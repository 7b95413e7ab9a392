"""A plan as plain data for ``--json``, and as tables for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from fp8dispatch.pack.layouts.loadability import TARGETS
from fp8dispatch.pack.planned import Plan
from fp8dispatch.pack.report import Totals
from fp8dispatch.pack.scheme import MSE

if TYPE_CHECKING:
    from rich.console import Console

_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
_MOST_REASONS = 5
_MOST_PROBLEMS = 20


class Row(BaseModel):
    """What happens to one tensor of the source, or to one expert of it.

    Attributes:
        name: tensor name; of an expert, the name that its weight gets.
        file: the shard that it is in.
        dtype: safetensors' name of its dtype in the source.
        shape: its shape.
        action: quantize or keep.
        scheme: how it is quantised; None where it is kept.
        reason: why it is kept; None where it is quantised.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    file: str
    dtype: str
    shape: list[int]
    action: Literal["quantize", "keep"]
    scheme: str | None
    reason: str | None


class Loads(BaseModel):
    """Where the result loads.

    Attributes:
        target: transformers, vllm or here.
        loads: whether every quantised module does.
        refusals: module -> why it does not.
        remarks: conditions under which it loads, each once.
    """

    model_config = ConfigDict(extra="forbid")

    target: str
    loads: bool
    refusals: dict[str, str]
    remarks: list[str]


class PlanSummary(BaseModel):
    """A plan, complete.

    Attributes:
        source: the checkpoint's folder.
        model_types: of the configuration and its parts.
        format: the on-disk format.
        recipe: the recipe's name.
        dtype: FP8 dtype of the weights.
        scales: how they are found, ``"amax"`` or ``"mse"``.
        on_ragged: what happens to weights that are no whole blocks.
        tp: ranks of tensor parallelism that were assumed.
        rows: every tensor.
        loads: where the result loads.
        problems: why packing would fail.
        warnings: what to know before.
        bytes_before, bytes_after: of all tensors.
        files: the weight files of the result and their sizes.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    model_types: list[str]
    format: str
    recipe: str
    dtype: str
    scales: str
    on_ragged: str
    tp: int
    rows: list[Row]
    loads: list[Loads]
    problems: list[str]
    warnings: list[str]
    bytes_before: int
    bytes_after: int
    files: dict[str, int]

    @classmethod
    def of(cls, planned: Plan) -> PlanSummary:
        """The summary of a plan."""
        resolved = planned.resolved
        return cls(
            source=str(planned.checkpoint.folder),
            model_types=list(planned.model_types),
            format=resolved.layout.name,
            recipe=resolved.recipe,
            dtype=resolved.scheme.dtype,
            scales=resolved.asked.scales,
            on_ragged=resolved.on_ragged.value,
            tp=resolved.asked.tp,
            rows=list(_rows(planned)),
            loads=[_loads(planned, target) for target in TARGETS],
            problems=list(planned.problems),
            warnings=list(planned.warnings),
            bytes_before=planned.checkpoint.total_bytes,
            bytes_after=planned.bytes_after,
            # Of a plan with problems the files are not known.
            files={} if planned.problems else {one.file: one.nbytes for one in planned.shards},
        )


class PackSummary(BaseModel):
    """What packing did.

    Attributes:
        out: the folder that was written.
        resumed: whether a job that was killed was taken up.
        plan: what was carried out.
        totals: how much was lost; None where no report was asked for.
        report_files: the files with the figures of each weight.
        notes: what to know afterwards.
    """

    model_config = ConfigDict(extra="forbid")

    out: str
    resumed: bool
    plan: PlanSummary
    totals: Totals | None
    report_files: list[str]
    notes: list[str]


def _rows(planned: Plan) -> Iterator[Row]:
    for weight in planned.weights.values():
        yield Row(
            name=f"{weight.module.name}.weight",
            file=weight.origin.file,
            dtype=weight.origin.dtype,
            shape=list(weight.module.shape),
            action="quantize",
            scheme=str(weight.module.scheme),
            reason=None,
        )
    for kept in planned.kept:
        tensor = kept.tensor
        yield Row(
            name=tensor.name,
            file=tensor.file,
            dtype=tensor.dtype,
            shape=list(tensor.shape),
            action="keep",
            scheme=None,
            reason=kept.reason,
        )


def _loads(planned: Plan, target: str) -> Loads:
    verdicts = [verdict for verdict in planned.verdicts if verdict.target == target]
    return Loads(
        target=target,
        loads=all(verdict.loads for verdict in verdicts),
        refusals={one.module: one.reason for one in verdicts if not one.loads},
        remarks=sorted({one.reason for one in verdicts if one.loads and one.reason}),
    )


def render(summary: PlanSummary, console: Console) -> None:
    """Print a plan: its table with equal layers in one line, where it loads, and what is wrong."""
    searched = ", scales by the least squared error" if summary.scales == MSE else ""
    console.print(
        f"{summary.source}: {', '.join(summary.model_types) or 'no model type'}; {summary.recipe} "
        f"({summary.dtype}) in {summary.format}{searched}"
    )
    for line in _table(summary):
        console.print(line)
    after, before = summary.bytes_after, summary.bytes_before
    console.print(f"{before:,} bytes become {after:,} ({after / max(1, before):.1%})")
    for loads in summary.loads:
        _render_loads(loads, console)
    for warning in summary.warnings:
        console.print(f"warning: {warning}")
    for problem in summary.problems[:_MOST_PROBLEMS]:
        console.print(f"problem: {problem}")
    if len(summary.problems) > _MOST_PROBLEMS:
        console.print(f"and {len(summary.problems) - _MOST_PROBLEMS} more problems: see --json")


def _table(summary: PlanSummary) -> list[str]:
    """Rows that differ in numbers alone (of layers, of experts) are one, with their count.

    Lines are as long as their names: cut or folded names could not be searched for or copied.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for row in summary.rows:
        what = row.scheme if row.action == "quantize" else f"keep: {row.reason}"
        shape = " x ".join(map(str, row.shape))
        counts[_NUMBER.sub("*", row.name), row.dtype, shape, what or ""] += 1
    rows = [("tensor", "of", "shape", "count", "decision")]
    rows += [(name, dtype, shape, str(n), what) for (name, dtype, shape, what), n in counts.items()]
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _render_loads(loads: Loads, console: Console) -> None:
    remark = f" ({'; '.join(loads.remarks)})" if loads.remarks else ""
    where = {"here": "fp8dispatch"}.get(loads.target, loads.target)
    if loads.loads:
        console.print(f"loads in {where}{remark}")
        return
    reasons: dict[str, list[str]] = {}
    for module, reason in loads.refusals.items():
        reasons.setdefault(reason, []).append(module)
    console.print(f"does not load in {where}: {len(loads.refusals)} modules")
    for reason, modules in list(reasons.items())[:_MOST_REASONS]:
        others = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        console.print(f"  {modules[0]}{others}: {reason}")
    if len(reasons) > _MOST_REASONS:
        console.print(f"  and {len(reasons) - _MOST_REASONS} further reasons: see --json")
