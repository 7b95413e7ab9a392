"""What a linear costs in memory: ``python -m bench memory``. Bytes, not seconds.

For each backend: the layouts that it prepares and keeps for one weight, and the most that a forward
pass holds beyond its inputs. For backward: the most that dX holds, as the kernel and as strips
compute it, beside the weight as bf16 would be, which neither may hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.arms import RECIPES, Checked, Linear, backends_for
from bench.session import Point, Row, Session
from bench.shapes import GRID, TINY, Weight
from fp8dispatch import dequantized_grad
from fp8dispatch.dequantized_grad import Way
from fp8dispatch.prepare import invalidate, prepared_bytes, weight_scale_fp32

ROWS = (16, 4096)


def points(session: Session) -> Iterator[Point]:
    """Two weights of the grid; the larger shows that strips stay bounded."""
    for recipe in session.recipes:
        for weight in TINY if session.rehearsal else (GRID[1], GRID[5]):
            for m in (5,) if session.rehearsal else ROWS:
                label = f"{recipe} {m}x{weight.n}x{weight.k}"
                yield label, partial(measure, session, m, weight, recipe)


def measure(session: Session, m: int, weight: Weight, recipe: str) -> Row:
    """One shape in one recipe."""
    n, k = weight.n, weight.k
    operands = Linear(m, n, k, RECIPES[recipe], session.device)
    data, scale = operands.weights[0]
    checked = Checked()
    prepared: dict[str, int] = {}
    forward: dict[str, int | None] = {}
    with torch.no_grad():
        for name in backends_for(session.backends, m, n, k):
            invalidate(data, scale)  # what another backend prepared is not this one's
            if checked.try_arm(name, operands.whole(name), operands.check(name)):
                prepared[name] = prepared_bytes(data) + prepared_bytes(scale)
                forward[name] = session.timer.peak_bytes(checked.arms[name])
        grad = torch.randn(m, n, device=session.device, dtype=torch.bfloat16)
        fp32 = weight_scale_fp32(scale, operands.recipe, n, k)
        backward: dict[str, int | None] = {}
        for way in dequantized_grad.Way if session.device == "cuda" else (Way.STRIPS,):
            backward[way.value] = session.timer.peak_bytes(
                partial(dequantized_grad.grad_input, grad, data, fp32, operands.recipe, way)
            )
    return {
        "recipe": str(operands.recipe),
        "m": m,
        "n": n,
        "k": k,
        "bytes": {
            "weight": data.nbytes + scale.nbytes,
            "weight in bf16": 2 * n * k,
            "output": 2 * m * n,
            "dX": 2 * m * k,
        },
        "prepared_bytes": prepared,
        "forward_peak_bytes": forward,
        "backward_peak_bytes": backward,
        **checked.told(),
    }
