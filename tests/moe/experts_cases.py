"""What tests of `FP8Experts` share: unquantised experts, and modules made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8dispatch import FP8Experts
from fp8dispatch.moe import forward
from tests.oracle import RECIPES

if TYPE_CHECKING:
    from fp8dispatch.recipe import Recipe

E, INNER, H = 5, 96, 160
BLOCK = RECIPES["block-128x128"]

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
every_route = pytest.mark.parametrize("route", ["batched", "grouped"])


def make_weights(
    layout: str = "fused", *, bias: bool = False, static: bool = False, inner: int = INNER
) -> dict[str, torch.Tensor]:
    """Unquantised experts under the names of the module."""
    into = {
        "fused": {"gate_up_proj": 2 * inner},
        "apart": {"gate_proj": inner, "up_proj": inner},
        "plain": {"up_proj": inner},
    }[layout]
    weights = {name: torch.randn(E, rows, H) * 0.1 for name, rows in into.items()}
    weights["down_proj"] = torch.randn(E, H, inner) * 0.1
    for name, weight in list(weights.items()):
        if bias:
            weights[f"{name}_bias"] = torch.randn(E, weight.shape[1])
        if static:
            weights[f"{name}_activation_scale"] = 0.005 + 0.01 * torch.rand(E)
    return weights


def make_module(recipe: Recipe = BLOCK, layout: str = "fused", **options: Any) -> FP8Experts:
    return FP8Experts.from_weights(make_weights(layout, **options), recipe)


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every forward go one way."""
    monkeypatch.setattr(forward, "GROUPED_FROM", {"batched": 10**9, "grouped": 0}[route])
