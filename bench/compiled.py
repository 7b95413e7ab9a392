"""A linear under torch.compile and in a CUDA graph: ``python -m bench compile``.

Arms: "eager", "replay" (a CUDA graph of the eager call) and "compiled"
(``torch.compile(fullgraph=True)`` of an `FP8Linear`). Two figures for each: "device", a call
behind so many flushes of L2 that the host is never waited for, and "wall", calls back to back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import fp8dispatch
from bench.arms import RECIPES, Checked, Linear
from bench.session import Point, Row, Session
from bench.shapes import GRID, TINY, Weight
from bench.timing import alternate, table

ROWS = (1, 16, 4096)
AHEAD = 10  # flushes: 0.6 ms, in which the host issues any of these calls


def points(session: Session) -> Iterator[Point]:
    """One weight of the grid in every recipe: each point compiles anew."""
    for recipe in session.recipes:
        for weight in TINY[:1] if session.rehearsal else GRID[1:2]:
            for m in (5,) if session.rehearsal else ROWS:
                label = f"{recipe} {m}x{weight.n}x{weight.k}"
                yield label, partial(measure, session, m, weight, recipe)


def measure(session: Session, m: int, weight: Weight, recipe: str) -> Row:
    """One shape in one recipe, by the backend that is chosen."""
    operands = Linear(m, weight.n, weight.k, RECIPES[recipe], session.device)
    data, scale = operands.weights[0]
    layer = fp8dispatch.FP8Linear.from_tensors(data, scale)
    # The inductor needs a compiler; a rehearsal shows that the graph has no break without it.
    backend = "aot_eager" if session.rehearsal else "inductor"
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    chosen = operands.explain(None).backend
    check = operands.check(chosen)
    checked, timer = Checked(), session.timer
    with torch.no_grad():
        checked.try_arm("eager", partial(layer, operands.x), check)
        checked.try_arm("compiled", partial(compiled, operands.x), check)
        device = {
            name: partial(timer.single, arm, flushes=AHEAD) for name, arm in checked.arms.items()
        }
        wall = {name: partial(timer.wall, arm) for name, arm in checked.arms.items()}
        if "eager" in checked.arms:
            replay = timer.replay(checked.arms["eager"])
            device["replay"] = partial(timer.single, replay, flushes=AHEAD)
            wall["replay"] = partial(timer.wall, replay)
        figures = {
            "device": table(alternate(device, session.rounds)),
            "wall": table(alternate(wall, session.rounds)),
        }
    return {
        "recipe": str(operands.recipe),
        "m": m,
        "n": weight.n,
        "k": weight.k,
        "chosen": chosen,
        **figures,
        **checked.told(),
    }
