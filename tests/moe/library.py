"""One call on one backend of expert matmuls, without the router before it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fp8dispatch.moe.execute import ExpertsCall, decoded_weights, describe_call, route_of
from fp8dispatch.policy import Policy
from fp8dispatch.problem import Accuracy, ExpertsProblem
from fp8dispatch.recipe import BLOCK_128, Recipe

if TYPE_CHECKING:
    from fp8dispatch.moe.backends.contract import ExpertBackend
    from tests.moe.cases import Call

E4M3 = "float8_e4m3fn"
ROUTED = ExpertsProblem(64, 4096, 7168, BLOCK_128, E4M3, E4M3, "bfloat16", experts=8)
STATIC = "static: needs one activation scale for all experts, or none, found 8 of them"
CONTIGUOUS = (
    "contiguous: needs a contiguous weight (make it contiguous once), found gaps between its rows"
)
BIAS = (
    "bias: needs no bias (added to its bfloat16 product it would be rounded twice: use a backend "
    "that fuses it, or add it outside), found one"
)


def routed(recipe: Recipe = BLOCK_128, **changes: object) -> ExpertsProblem:
    """The problem with other fields."""
    return replace(ROUTED, recipe=recipe, **changes)  # type: ignore[arg-type]


def run(backend: ExpertBackend, call: Call, accuracy: Accuracy = Accuracy.EXACT) -> torch.Tensor:
    """The call's output, computed by `backend` alone; it must not refuse the call."""
    named, batched = call.arguments, call.way.startswith("batched")
    weight, static = named["weight"], named.get("activation_scale")
    routing = route_of(
        named["x"].shape[0],
        weight.shape[0],
        named["expert_ids" if batched else "offsets"],
        named.get("gather"),
        named.get("scatter"),
        batched=batched,
    )
    described = ExpertsCall(call.recipe, torch.bfloat16, Policy(accuracy=accuracy), batched)
    problem = describe_call(routing, weight, described, None, static)
    weights = decoded_weights(weight, named["weight_scale"], call.recipe)
    every = None if static is None else static.expand(weight.shape[0])
    return backend.experts(named["x"], weights, None, every, routing, problem)
