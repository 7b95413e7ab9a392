"""The whole linear: ``python -m bench linear``. bf16 in, bf16 out, dynamic activations.

Every backend that takes a call and gives right numbers, the automatic choice ("automatic", which
also takes the decision) and bf16 `F.linear`, each

* "eager": a single call behind a flush of L2, on the stream's clock;
* "graph": the same call captured and replayed behind a flush: the device's time;
* "wall", up to 256 rows: calls back to back on the host's clock, where Python may be what binds.

A point is late where the automatic choice costs over 5 % and over 2 us more than the best backend
that it may take: a route in `fp8dispatch/routes.json` mends that (`python -m bench routes`).
Backends that must be named compute other numbers: they are timed, but nothing to choose from.
Row scales are also timed with fast accumulation, as the libraries themselves have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

import fp8dispatch
from bench import ceilings
from bench.arms import LIBRARIES, RECIPES, Arm, Checked, Linear, backends_for, selectable
from bench.session import Point, Row, Session
from bench.shapes import points as shapes_of
from bench.timing import Figure, alternate, table
from fp8dispatch import registry
from fp8dispatch.problem import Accuracy

SLACK, SLACK_US = 1.05, 2.0
WALL_ROWS = 256
AUTOMATIC = "automatic"


def points(session: Session) -> Iterator[Point]:
    """Every shape of the grid in every recipe; row scales also with fast accumulation."""
    yield "ceilings", partial(ceilings.measure, session)
    for accuracy in (Accuracy.EXACT, Accuracy.FAST):
        if not session.takes(accuracy.value):
            continue
        for recipe in session.recipes:
            if accuracy is Accuracy.FAST and recipe == "block":
                continue  # no backend accumulates blocks fast
            fast_grid = "tiny" if session.rehearsal else "grid"
            for m, weight in shapes_of(fast_grid if accuracy is Accuracy.FAST else session.grid):
                label = f"{recipe} {accuracy.value} {m}x{weight.n}x{weight.k}"
                yield label, partial(measure, session, m, weight, recipe, accuracy)


def measure(session: Session, m: int, weight: Any, recipe: str, accuracy: Accuracy) -> Row:
    """One shape in one recipe."""
    operands = Linear(m, weight.n, weight.k, RECIPES[recipe], session.device)
    checked = Checked()
    # Exact is the default; stating it would cost a repeated call the shortest way through.
    fast = accuracy is Accuracy.FAST
    stated = fp8dispatch.use_backend(accuracy=accuracy) if fast else nullcontext()
    with torch.inference_mode(), stated:
        for name in backends_for(session.backends, m, weight.n, weight.k):
            if fast and Accuracy.FAST not in registry.load(name).accuracies:
                continue
            checked.try_arm(name, operands.whole(name), operands.check(name, accuracy))
        row: Row = {
            "recipe": str(operands.recipe),
            "accuracy": accuracy.value,
            "m": m,
            "n": weight.n,
            "k": weight.k,
            "name": weight.name,
            **_choice(operands, checked, accuracy),
        }
        checked.try_arm("bf16", operands.bf16(), operands.check(None))
        arms = checked.arms
        row["selectable"] = selectable(arms)
        row["eager"] = _compare(session, arms, row["selectable"], session.timer.single)
        replays = checked.captured(
            {name: partial(session.timer.replay, arm) for name, arm in arms.items()}
        )
        row["graph"] = _compare(session, replays, row["selectable"], session.timer.single)
        if m <= WALL_ROWS:
            wall = {name: partial(session.timer.wall, arm) for name, arm in arms.items()}
            row["wall"] = table(alternate(wall, session.rounds))
    return row | checked.told()


def _choice(operands: Linear, checked: Checked, accuracy: Accuracy) -> Row:
    """What is chosen, with every library and without those that need more than torch and triton."""
    decision = operands.explain(None)
    without = ",".join(f"-{name}" for name in LIBRARIES)
    with fp8dispatch.use_backend(without, accuracy=accuracy):
        alone = operands.explain(None)
    arm, check = operands.whole(None), operands.check(decision.backend, accuracy)
    checked.try_arm(AUTOMATIC, arm, check)
    return {
        "chosen": decision.backend,
        "route": decision.route,
        "chosen without libraries": alone.backend,
    }


def _compare(
    session: Session,
    arms: Mapping[str, Arm | Callable[[], Any]],
    choices: list[str],
    clock: Callable[[Callable[[], Any]], float],
) -> Row:
    """Microseconds of each arm, and the automatic choice against the best of the choices."""
    figures = alternate({name: partial(clock, arm) for name, arm in arms.items()}, session.rounds)
    return {**table(figures), **lateness(figures, choices)}


def lateness(figures: Mapping[str, Figure], choices: list[str]) -> Row:
    """How much more the automatic choice costs than the best backend that it may take."""
    timed = [figures[name].us for name in choices if name in figures]
    if AUTOMATIC not in figures or not timed:
        return {}
    best, mine = min(timed), figures[AUTOMATIC].us
    late = mine > best * SLACK and mine > best + SLACK_US
    return {"loss": round(mine / best, 3), "late": late}


def summary(rows: list[Row]) -> dict[str, Any]:
    """How many points are late, eager and replayed."""
    timed = [row for row in rows if "eager" in row]
    counts = {
        kind: sum(bool(row[kind].get("late")) for row in timed) for kind in ("eager", "graph")
    }
    return {"points": len(timed), "late": counts}
