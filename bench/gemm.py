"""The multiplication alone, M >= 256: ``python -m bench gemm``.

Operands are quantised already and lie as each backend wants them. Every arm is a CUDA graph
replayed behind a flush of L2, so the time is the device's. M <= 64 is another question: the suite
`decode` answers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench import ceilings
from bench.arms import RECIPES, Checked, Linear, backends_for
from bench.session import Point, Row, Session
from bench.shapes import points as shapes_of
from bench.timing import alternate, table
from fp8dispatch import registry
from fp8dispatch.errors import BackendUnavailableError

SMALLEST = 256


def points(session: Session) -> Iterator[Point]:
    """Every shape of the grid with M >= 256, in every recipe."""
    yield "ceilings", partial(ceilings.measure, session)
    for recipe in session.recipes:
        for m, weight in shapes_of(session.grid, at_least=1 if session.rehearsal else SMALLEST):
            label = f"{recipe} {m}x{weight.n}x{weight.k}"
            yield label, partial(measure, session, m, weight, recipe)


def measure(session: Session, m: int, weight: Any, recipe: str) -> Row:
    """One shape in one recipe."""
    operands = Linear(m, weight.n, weight.k, RECIPES[recipe], session.device)
    with torch.inference_mode():
        checked = admit(operands, backends_for(session.backends, m, weight.n, weight.k))
        checked.try_arm("bf16", operands.bf16(), operands.check(None))
        replays = checked.captured(
            {name: partial(session.timer.replay, arm) for name, arm in checked.arms.items()}
        )
        figures = alternate(
            {name: partial(session.timer.single, arm) for name, arm in replays.items()},
            session.rounds,
        )
    return {
        "recipe": str(operands.recipe),
        "m": m,
        "n": weight.n,
        "k": weight.k,
        "name": weight.name,
        **table(figures),
        "tflops": {
            name: round(2 * m * weight.n * weight.k / one.us / 1e6) for name, one in figures.items()
        },
        **checked.told(),
    }


def admit(operands: Linear, names: tuple[str, ...]) -> Checked:
    """The backends that multiply quantised operands of this shape right."""
    checked = Checked()
    for name in names:
        if not registry.load(name).quantizes_activations:
            continue  # it takes none
        try:
            arm = operands.alone(name)
        except BackendUnavailableError as refusal:
            checked.refused[name] = str(refusal)
        else:
            checked.try_arm(name, arm, operands.check(name))
    return checked
