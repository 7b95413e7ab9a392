"""What a call keeps the host busy for: ``python -m bench host``.

Warm, eager, no gradient, on a problem so small that the GPU waits. Each backend's own entry point
is called directly with everything prepared (what ``backend.settled`` has ready for a repeated call,
else ``backend.linear`` on a described problem), then through `fp8_linear`; the difference is what
`fp8_linear` costs over it. Arms alternate, 20 calls at a time, and figures are medians over the
rounds. "Front alone" has the computation replaced by a function that returns at once: what is left
is `fp8_linear`, in a loop that stays in the caches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

import fp8dispatch
from bench.arms import RECIPES, Checked, Linear, backends_for
from bench.session import Point, Row, Session
from bench.timing import Timer
from fp8dispatch import registry
from fp8dispatch.backends.contract import Backend, Weight
from fp8dispatch.prepare import weight_scale_fp32

M, N, K = 16, 256, 256
ROUNDS = 300


def points(session: Session) -> Iterator[Point]:
    """Every backend in every recipe; TorchAO too, since there is one size."""
    for recipe in session.recipes:
        for name in session.backends or (*backends_for(None, M, N, K), "torchao"):
            yield f"{recipe} {name}", partial(measure, session, name, recipe)


def measure(session: Session, name: str, recipe: str) -> Row:
    """One backend in one recipe, or why it does not take the call."""
    operands = Linear(M, N, K, RECIPES[recipe], session.device)
    x, (data, scale) = operands.x, operands.weights[0]
    x3 = x.view(2, M // 2, K)
    row: Row = {"backend": name, "recipe": str(operands.recipe)}
    rounds = 2 if session.rehearsal else ROUNDS
    with torch.no_grad():
        checked = Checked()
        if not checked.try_arm("fp8_linear", operands.whole(name), operands.check(name)):
            return row | checked.told()
        backend, problem = registry.load(name), operands.explain(name).problem
        fp32 = weight_scale_fp32(scale, operands.recipe, N, K)
        operand = Weight(data, fp32, operands.recipe, scale)
        ready = backend.settled(operand, None, problem, x.device)
        arms: dict[str, Callable[[], torch.Tensor]] = {
            "entry": (
                partial(backend.linear, x, operand, None, None, problem)
                if ready is None
                else partial(ready, x, data, None)
            ),
            "fp8_linear": lambda: fp8dispatch.fp8_linear(x, data, scale, backend=name),
            "fp8_linear, 3 dimensions": lambda: fp8dispatch.fp8_linear(
                x3, data, scale, backend=name
            ),
            "bf16": operands.bf16(),
        }
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm, call in arms.items():
                times[arm].append(session.timer.host(call))
        front = _front(session.timer, backend, x, data, scale, rounds)
    over = [
        through - direct
        for through, direct in zip(times["fp8_linear"], times["entry"], strict=True)
    ]
    return row | {
        "settled": ready is not None,
        "us": {arm: round(statistics.median(values), 2) for arm, values in times.items()},
        "over_entry_us": round(statistics.median(over), 2),
        "over_entry_quartiles_us": [round(q, 2) for q in statistics.quantiles(over)],
        "front_alone_us": front,
    }


def _front(
    timer: Timer,
    backend: Backend,
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    rounds: int,
) -> float:
    """Microseconds of `fp8_linear` around a computation that takes none."""
    out = fp8dispatch.fp8_linear(x, data, scale, backend=backend.name)
    weight = data.clone()  # another weight, so that its plan is made anew

    def stub(*_: Any) -> torch.Tensor:
        return out

    with (
        mock.patch.object(backend, "linear", stub),
        mock.patch.object(backend, "settled", lambda *_: stub),
    ):
        over = [
            timer.host(lambda: fp8dispatch.fp8_linear(x, weight, scale, backend=backend.name))
            - timer.host(stub)
            for _ in range(rounds)
        ]
    return round(statistics.median(over), 2)
