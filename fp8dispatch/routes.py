"""The order of backends for a problem on a machine: tuned, measured, and the default behind them.

A tuned order was measured on the user's own machine (`fp8dispatch.tuning`) and comes first.
Measured routes are data, `routes.json`, each with the file that it was measured in: architecture,
recipe, a range of M, a range of output tiles, and an order. Backends that a route does not name
follow in the default order, so that every order names every backend.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from fp8dispatch.kernels.tile import Tile
from fp8dispatch.machine import Machine
from fp8dispatch.problem import ExpertsProblem, LinearProblem
from fp8dispatch.recipe import ceil_div

TILE = 128
NO_LIMIT = 2**63 - 1


@dataclass(frozen=True)
class Route:
    """Where one order of backends has been measured to be the best.

    Attributes:
        capability: compute capability it holds for.
        recipes: recipes it holds for, as they are printed ("tensor", "row", "block 128x128").
        m_min, m_max: rows of the output it holds for, both included.
        tiles_min, tiles_max: tiles of 128x128 in the output it holds for, both included: how much
            work there is to share among the multiprocessors.
        order: backends, the fastest first.
        evidence: the result file that shows it.
    """

    capability: tuple[int, int]
    recipes: tuple[str, ...]
    m_min: int
    m_max: int
    tiles_min: int
    tiles_max: int
    order: tuple[str, ...]
    evidence: str

    def fits(self, problem: LinearProblem, machine: Machine) -> bool:
        """The route holds for a call on a machine."""
        return (
            machine.capability == self.capability
            and str(problem.recipe) in self.recipes
            and self.m_min <= problem.m <= self.m_max
            and self.tiles_min <= tiles(problem) <= self.tiles_max
        )


@dataclass(frozen=True)
class TunedRoute:
    """What was measured on this machine for a call like the one at hand.

    Attributes:
        order: backends, the fastest first; empty where nothing says so.
        source: where that comes from, for explanations.
        wrong: backend -> what was wrong with its numbers; it must not run the call.
        tiles: backend -> the tile that it was the fastest with, where that is not its own choice.
    """

    order: tuple[str, ...]
    source: str
    wrong: Mapping[str, str] = field(default_factory=dict)
    tiles: Mapping[str, Tile] = field(default_factory=dict)


def tiles(problem: LinearProblem) -> int:
    """Tiles of 128x128 in the output."""
    return ceil_div(problem.m, TILE) * ceil_div(problem.n, TILE)


@functools.cache
def measured() -> tuple[Route, ...]:
    """The routes of `routes.json`; the first one that fits a call holds."""
    text = resources.files("fp8dispatch").joinpath("routes.json").read_text("utf-8")
    return tuple(
        Route(
            tuple(entry["capability"]),
            tuple(entry["recipes"]),
            entry.get("m_min", 0),
            entry.get("m_max", NO_LIMIT),
            entry.get("tiles_min", 0),
            entry.get("tiles_max", NO_LIMIT),
            tuple(entry["order"]),
            entry["evidence"],
        )
        for entry in json.loads(text)["routes"]
    )


# Where nothing was measured: on Hopper the libraries that are installed for this, the vendor's GEMM
# and then ours. Elsewhere the vendor's GEMM and our kernels come first: TorchAO's kernel is as
# portable as ours and times 48 configurations at the first call of each size, and the block kernels
# of the others do not run there at all. Last are those that have no linear layer, and those that a
# call must name to get.
_LAST = ("cutlass", "weight_only", "fbgemm_tile", "mslk_tile")
_HOPPER = ("fbgemm", "mslk", "cublaslt", "torchao", "triton", "gluon", "deepgemm", *_LAST)
_OTHERS = ("cublaslt", "triton", "torchao", "fbgemm", "mslk", "deepgemm", "gluon", *_LAST)
# Ours are faster than each library at every size of bench/results/h200-experts.json, and of ours
# the Gluon kernel on Hopper, with tiles of 128 rows, from some rows for each expert on.
_EXPERTS = ("triton", "gluon", "deepgemm", "fbgemm", "mslk", "cutlass")
_MANY_ROWS = ("gluon", *(name for name in _EXPERTS if name != "gluon"))
ROWS_OF_AN_EXPERT = 8
"""On average, from which on an expert has many."""


def order_for(
    problem: LinearProblem,
    machine: Machine,
    known: tuple[str, ...],
    tuned: TunedRoute | None = None,
) -> tuple[tuple[str, ...], str]:
    """Every known backend in the order to try them, and where the order comes from.

    Args:
        known: the registered backends; what an order does not name follows in their order.
        tuned: what was measured on this machine for such a call; None where nothing was.
    """
    if tuned is not None and tuned.order:
        behind, _ = order_for(problem, machine, known)
        return _complete((*tuned.order, *behind), known), tuned.source
    if machine.device_type != "cuda":
        # Off the GPU plain torch comes first: the others run in an interpreter at best.
        return _complete(("eager",), known), "plain torch first off the GPU"
    if isinstance(problem, ExpertsProblem):
        many = machine.capability == (9, 0) and problem.m >= ROWS_OF_AN_EXPERT * problem.experts
        return _complete(_MANY_ROWS if many else _EXPERTS, known), "default"
    # Measured routes depend on M, and one batch must not be summed as another is not.
    for route in () if problem.batch_invariant else measured():
        if route.fits(problem, machine):
            return _complete(route.order, known), f"measured, {route.evidence}"
    hopper = machine.capability == (9, 0)
    return _complete(_HOPPER if hopper else _OTHERS, known), "default"


def _complete(order: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    named = tuple(dict.fromkeys(name for name in order if name in known))
    return (*named, *(name for name in known if name not in named))
