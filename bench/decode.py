"""The multiplication for up to 64 rows: ``python -m bench decode``.

There the time is that of reading the weight, so what matters is whether L2 holds it. "cold": a CUDA
graph of launches that walks over copies of the weight, together far larger than L2. "warm": as many
launches on one weight, of which L2 holds up to some 50 MB. Never compare one with the other. Arms:
each backend on quantised operands, each backend's whole linear ("whole"), bf16, and "read", a
kernel that reads the bytes of the FP8 weight and does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench import ceilings
from bench.arms import RECIPES, Checked, Linear, backends_for
from bench.gemm import admit
from bench.session import Point, Row, Session
from bench.shapes import DECODE, DECODE_ROWS, TINY, TINY_ROWS
from bench.timing import Timer, alternate, copies_for, table

WARM_LAUNCHES = 10


def points(session: Session) -> Iterator[Point]:
    """Five weights, M from 1 to 64."""
    weights = TINY if session.rehearsal else DECODE
    rows = TINY_ROWS if session.rehearsal else DECODE_ROWS
    for recipe in session.recipes:
        for weight in weights:
            for m in rows:
                label = f"{recipe} {m}x{weight.n}x{weight.k}"
                yield label, partial(measure, session, m, weight, recipe)


def measure(session: Session, m: int, weight: Any, recipe: str) -> Row:
    """One shape in one recipe, cold and warm."""
    n, k, timer = weight.n, weight.k, session.timer
    copies = 2 if session.rehearsal else copies_for(n * k)
    operands = Linear(m, n, k, RECIPES[recipe], session.device, copies=copies)
    with torch.inference_mode():
        names = backends_for(session.backends, m, n, k)
        checked = admit(operands, names)
        whole = Checked()
        for name in checked.arms:
            whole.try_arm(name, operands.whole(name), operands.check(name))
        dense = [operands.dense] + [operands.dense.clone() for _ in range(copies // 2)]
        linear = torch.nn.functional.linear
        bf16 = [partial(linear, operands.x, one) for one in dense]
        makers: dict[str, dict[str, Callable[[], Callable[[], float]]]] = {
            "cold": {
                **{name: _walk(timer, operands.alone, name, copies) for name in checked.arms},
                "bf16": partial(timer.chain, bf16),
                "read": partial(ceilings.cold_read, session, n, k),
            },
            "whole, cold": {
                name: _walk(timer, operands.whole, name, copies) for name in whole.arms
            },
            "warm": {
                name: partial(timer.chain, [operands.alone(name)] * WARM_LAUNCHES)
                for name in checked.arms
            },
        }
        chains = {
            kind: (whole if kind.startswith("whole") else checked).captured(some)
            for kind, some in makers.items()
        }
        rounds = session.rounds
        return {
            "recipe": str(operands.recipe),
            "m": m,
            "n": n,
            "k": k,
            "name": weight.name,
            "weight_bytes": n * k,
            "copies": copies,
            **{kind: table(alternate(some, rounds)) for kind, some in chains.items()},
            **checked.told(),
            **{f"whole, {key}": said for key, said in whole.told().items()},
        }


def _walk(
    timer: Timer,
    make: Callable[[str, int], Callable[[], torch.Tensor]],
    name: str,
    copies: int,
) -> Callable[[], Callable[[], float]]:
    """Makes a chain that finds its weights cold."""
    return lambda: timer.chain([make(name, copy) for copy in range(copies)])
