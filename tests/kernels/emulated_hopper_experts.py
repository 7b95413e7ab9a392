"""Whole calls of the grouped Hopper kernel on a CPU, over `gluon_emulator`.

Routing, quantising and the table of tiles run in Triton's interpreter; of the multiplication the
kernel's own functions run, in the emulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from fp8dispatch.kernels import (
    hopper_experts,
    hopper_experts_launch,
    hopper_experts_tile,
    hopper_tile,
)
from fp8dispatch.kernels.hopper_experts_config import GROUP_M
from fp8dispatch.kernels.hopper_experts_tile import place_in_expert
from fp8dispatch.kernels.launch import plain_launch
from fp8dispatch.moe.backends.gluon import BACKEND
from fp8dispatch.moe.execute import ExpertsCall, decoded_weights, describe_call, route_of
from fp8dispatch.policy import Policy
from tests.kernels import gluon_emulator

if TYPE_CHECKING:
    import pytest

    from fp8dispatch.moe.backends.contract import ExpertWeights
    from tests.moe.cases import Call

PLACE: Callable[[int, int, int, int, int], tuple[int, int]] = place_in_expert.fn
"""The kernel's own arithmetic, as Python."""


def tiles_of(
    table: torch.Tensor, tiles_n: int, program: int, programs: int
) -> Iterator[tuple[int, int, int, int]]:
    """Expert, end of its rows, first row and column of the tiles that one program takes."""
    for tile in range(program, int(table[0, 0]) * tiles_n, programs):
        expert, start, end, before = table[1 + tile // tiles_n].tolist()
        row, tile_n = PLACE(tile - before * tiles_n, start, end, tiles_n, GROUP_M)
        yield expert, end, row, tile_n


class Emulated:
    """Stands for the compiled kernel."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._kernel = make()
        self.constants: dict[str, Any] = self._kernel._options

    def __call__(self, *launch: Any) -> None:
        gluon_emulator.run(self._kernel, *launch)


def install(monkeypatch: pytest.MonkeyPatch) -> list[Emulated]:
    """Replace the kernel and the cheap launches; what runs is appended to the list."""
    ran: list[Emulated] = []

    def emulated(key: Any, make: Callable[[], Any]) -> Emulated:
        ran.append(Emulated(make))
        return ran[-1]

    modules = [hopper_tile, hopper_experts_tile, hopper_experts]
    for module, name, stand_in in gluon_emulator.replacements(modules):
        monkeypatch.setattr(module, name, stand_in, raising=False)
    # A name of Gluon that the other kernels do without.
    layout = SimpleNamespace(layout=None)
    monkeypatch.setattr(gluon_emulator.Tile, "type", layout, raising=False)
    monkeypatch.setattr(hopper_experts_launch, "kernel_for", emulated)
    monkeypatch.setattr(hopper_experts_launch, "launch", plain_launch)
    return ran


def run(call: Call, out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The backend's own computation of a call, undecided and untested."""
    named, batched = call.arguments, call.way.startswith("batched")
    weight, scale = named["weight"], named["weight_scale"]
    routing = route_of(
        named["x"].shape[0],
        weight.shape[0],
        named["expert_ids" if batched else "offsets"],
        named.get("gather"),
        named.get("scatter"),
        batched=batched,
    )
    described = ExpertsCall(call.recipe, out_dtype, Policy(), batched)
    static = named.get("activation_scale")
    problem = describe_call(routing, weight, described, named["bias"], static)
    weights: ExpertWeights = decoded_weights(weight, scale, call.recipe)
    each = None if static is None else static.expand(weight.shape[0])
    return BACKEND.experts(named["x"], weights, named["bias"], each, routing, problem)
