"""The truth about an FP8 dgrad: dY quantised by a quantiser of its own, multiplied in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8dispatch import fp8_linear, registry, use_backend
from fp8dispatch.backends.contract import Weight
from fp8dispatch.formats import decode_scale
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import Granularity, Recipe
from tests import oracle
from tests.oracle import RECIPES

MIN_SQNR_UNQUANTIZED = 29.0
"""Decibels that each row of dX keeps against the exact product, for normal dY (31 on average)."""

N, K = 200, 300
BLOCK = RECIPES["block-128x128"]
GROUPS = {name: recipe for name, recipe in RECIPES.items() if name.startswith("block-1x")}
"""The recipes that have no FP8 dgrad."""

TAKEN = {name: recipe for name, recipe in RECIPES.items() if name not in GROUPS}
every_recipe = pytest.mark.parametrize("recipe", TAKEN.values(), ids=TAKEN.keys())


def round_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of e4m3fn, halves to even, as float64; written from its definition."""
    wide = values.double()
    exponent = torch.frexp(wide).exponent.sub(1).clamp(min=-6)
    step = torch.ldexp(torch.ones_like(wide), exponent - 3)
    return (torch.round(wide / step) * step).clamp(-448.0, 448.0)


def quantized(grad: torch.Tensor, group: int) -> torch.Tensor:
    """dY [M, N] after quantisation in groups of columns, as float64; finite values only."""
    parts = []
    for columns in grad.float().split(group, dim=1):
        amax = columns.abs().amax(1, keepdim=True)
        # By a tensor: CUDA multiplies by the reciprocal of a number, which rounds otherwise.
        scale = torch.where(amax == 0, 1.0, amax.clamp(min=1e-12) / torch.full_like(amax, 448.0))
        parts.append(round_to_e4m3(columns / scale) * scale.double())
    return torch.cat(parts, 1)


def quantized_gradient(
    grad: torch.Tensor, scale: torch.Tensor, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the FP8 GEMM should multiply the codes of W with, and the scale that is left to W.

    Returns:
        [M, N] float64, and the multipliers of W that are not part of it: for the row recipe one,
        the largest, since a row's own is multiplied into dY.
    """
    flat = grad.detach().reshape(-1, grad.shape[-1])
    n = flat.shape[1]
    multipliers = decode_scale(scale.detach())
    if recipe.granularity is Granularity.ROW:
        rows = multipliers.reshape(1, n)
        largest = rows.max()
        share = torch.where(rows > 0, rows / largest, rows)
        return quantized(flat.float() * share, n), largest.reshape(1)
    group = n if recipe.block_size is None else recipe.block_size[0]
    return quantized(flat, group), multipliers


def truth(
    grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, recipe: Recipe
) -> oracle.Truth:
    """dX [M, K] of dY [..., N] and a weight [N, K], on the quantised operands."""
    operand, left = quantized_gradient(grad, scale, recipe)
    if recipe.granularity is Granularity.ROW:
        wide = weight.float().double() * left.double()
    else:
        wide = oracle.dequantized_weight(weight, scale, recipe)
    return oracle.truth(operand, wide.t())


def gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    recipe: Recipe,
    **options: Any,
) -> torch.Tensor:
    """dX of one call under ``dgrad="fp8"``; backward runs outside of the statement."""
    with use_backend(dgrad="fp8"):
        out = fp8_linear(x, weight, scale, block_size=recipe.block_size, **options)
    return torch.autograd.grad(out, x, grad.to(out))[0]


def layer(recipe: Recipe = BLOCK, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and its scale."""
    return oracle.make_weight(N, K, recipe, device=device)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LinearProblem, Weight]]:
    """Each product that plain torch or our kernels compute from now on: the problem, its weight."""
    seen: list[tuple[LinearProblem, Weight]] = []
    for name in ("eager", "triton"):
        backend = registry.load(name)

        def watched(
            x: Any, weight: Weight, bias: Any, problem: LinearProblem, matmul: Any = backend.matmul
        ) -> torch.Tensor:
            seen.append((problem, weight))
            out: torch.Tensor = matmul(x, weight, bias, problem)
            return out

        monkeypatch.setattr(backend, "matmul", watched)
    return seen
