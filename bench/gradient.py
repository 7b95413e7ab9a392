"""dX from the FP8 weight: ``python -m bench gradient``, against bf16 ``dY @ W``.

Arms: the ways of `fp8dispatch.dequantized_grad` ("gluon" and "triton" dequantise in a kernel,
"strips" dequantises a strip of the weight into memory and multiplies it with torch), and "bf16",
the multiplication over the weight that was never quantised. "chosen" is the first of the ways that
the library tries. "fp8" is ``dgrad="fp8"``: other numbers, dY quantised in the call, the transposed
weight at hand. CUDA graphs replayed behind a flush of L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.arms import RECIPES, Checked, Linear
from bench.session import Point, Row, Session
from bench.shapes import GRID, MODELS, TINY, Weight
from bench.timing import alternate, table
from fp8dispatch import dequantized_grad, dgrad
from fp8dispatch.dequantized_grad import Way, ways
from fp8dispatch.policy import Policy
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.probes.device import runs_kernels
from fp8dispatch.problem import Dgrad
from tests import fp8_gradients, oracle

ROWS = (16, 256, 1024, 4096)
WEIGHTS = (*GRID, MODELS[1], MODELS[3], MODELS[15], MODELS[18])


def points(session: Session) -> Iterator[Point]:
    """Weights of the grid and four of real models, in every recipe."""
    weights: tuple[Weight, ...] = TINY if session.rehearsal else WEIGHTS
    for recipe in session.recipes:
        for weight in weights:
            for m in (3, 40) if session.rehearsal else ROWS:
                label = f"{recipe} {m}x{weight.n}x{weight.k}"
                yield label, partial(measure, session, m, weight, recipe)


def measure(session: Session, m: int, weight: Weight, recipe: str) -> Row:
    """One shape: dY [m, n] times W [n, k]."""
    operands = Linear(m, weight.n, weight.k, RECIPES[recipe], session.device)
    grad = torch.randn(m, weight.n, device=session.device, dtype=torch.bfloat16)
    data, scale = operands.weights[0]
    fp32 = weight_scale_fp32(scale, operands.recipe, weight.n, weight.k)
    rows = torch.unique(torch.tensor([0, m // 2, m - 1]))
    wide = oracle.dequantized_weight(data, scale, operands.recipe)

    def check(out: torch.Tensor) -> None:
        assert out.shape == (m, weight.k), f"shape {tuple(out.shape)}"
        oracle.assert_gradient(out[rows], grad[rows], wide)

    def check_bf16(out: torch.Tensor) -> None:
        oracle.assert_gradient(out[rows], grad[rows], operands.dense.double())

    def check_fp8(out: torch.Tensor) -> None:
        expected = fp8_gradients.truth(grad[rows], data, scale, operands.recipe)
        oracle.assert_matches(out[rows], expected)

    fp8 = partial(
        dgrad.grad_input, grad, data, scale, operands.recipe, grad.dtype, Policy(dgrad=Dgrad.FP8)
    )
    kernels = session.device == "cuda" and runs_kernels(grad.device)
    checked = Checked()
    with torch.no_grad():
        for way in Way:
            if way is Way.TRITON and not kernels:
                checked.refused[way.value] = "needs a GPU that our Triton kernels run on"
                continue
            arm = partial(dequantized_grad.grad_input, grad, data, fp32, operands.recipe, way)
            checked.try_arm(way.value, arm, check)
        checked.try_arm("fp8", fp8, check_fp8)
        checked.try_arm("bf16", lambda: grad @ operands.dense, check_bf16)
        walks = checked.captured(
            {name: partial(session.timer.replay, arm) for name, arm in checked.arms.items()}
        )
        single = session.timer.single
        figures = alternate(
            {name: partial(single, arm) for name, arm in walks.items()}, session.rounds
        )
    return {
        "recipe": str(operands.recipe),
        "m": m,
        "n": weight.n,
        "k": weight.k,
        "name": weight.name,
        "chosen": ways(m, weight.n, weight.k, grad.device, grad.dtype)[0].value,
        **table(figures),
        **checked.told(),
    }
