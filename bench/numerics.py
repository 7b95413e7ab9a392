"""How close the backends come to the truth: ``python -m bench numerics --backends NAME,NAME...``.

Runs the matrix of the tests (`tests.matrix`) and keeps, for each backend, recipe and output
dtype: calls that ran, the lowest signal-to-noise ratios of a row (output, dX), the largest error
as a share of the per-element bound, and each refusal sentence with the number of calls it met.
FBGEMM and MSLK take a process each. Of what TorchAO would time for minutes a part is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch

from bench.session import Point, Row, Session
from fp8dispatch import registry
from tests import matrix

REHEARSED = 40  # cases of each matrix


def points(session: Session) -> Iterator[Point]:
    """Every backend and recipe; numbers outside the bounds fail the point."""
    for backend in session.backends or registry.NAMES:
        for recipe in ("row",) if session.rehearsal else matrix.RECIPES:
            yield f"{backend} {recipe}", partial(measure, session, backend, recipe)


def measure(session: Session, backend: str, recipe: str) -> Row:
    """The matrix of one backend and recipe: what its rows reached, by output dtype."""
    found: dict[str, dict[str, Any]] = {}
    refusals: Counter[str] = Counter()
    bench = matrix.Bench(session.device)
    torch.manual_seed(0)
    for case in islice(matrix.cases(backend, recipe), REHEARSED if session.rehearsal else None):
        if not matrix.affordable(case):
            continue
        outcome = bench.run(case)
        if outcome.refusal is not None:
            refusals[_reason(outcome.refusal, backend)] += 1
            continue
        row = found.setdefault(
            str(case.out_dtype).removeprefix("torch."),
            {"calls": 0, "sqnr_db": 999.0, "grad_sqnr_db": 999.0, "bound_used": 0.0},
        )
        row["calls"] += 1
        row["sqnr_db"] = round(min(row["sqnr_db"], outcome.sqnr), 1)
        row["grad_sqnr_db"] = round(min(row["grad_sqnr_db"], outcome.grad_sqnr), 1)
        row["bound_used"] = round(max(row["bound_used"], outcome.bound_used), 3)
    return {
        "backend": backend,
        "recipe": recipe,
        "found": found,
        "refusals": dict(refusals.most_common()),
    }


def summary(rows: list[Row]) -> dict[str, Any]:
    """The rows by output dtype, and all refusals: what the file is read for."""
    table = [
        {"backend": row["backend"], "recipe": row["recipe"], "out_dtype": dtype, **values}
        for row in rows
        for dtype, values in row.get("found", {}).items()
    ]
    refusals: Counter[str] = Counter()
    for row in rows:
        refusals.update(row.get("refusals", {}))
    failed = {row["label"]: row["failed"] for row in rows if "failed" in row}
    return {"numerics": table, "refusals": dict(refusals.most_common()), "failed": failed}


def _reason(sentence: str, backend: str) -> str:
    """The refusals of a sentence without the call they were about."""
    return f"{backend} " + sentence.split(f": {backend} ", 1)[1] if ": " in sentence else sentence
