"""The order of backends for a problem on a machine: measured routes, and the default behind them.

Measured routes are data, `routes.json`, each with the file that it was measured in: architecture,
recipe, a range of M, and an order. Backends that a route does not name follow in the default order,
so that every order names every backend.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem


@dataclass(frozen=True)
class Route:
    """Where one order of backends has been measured to be the best.

    Attributes:
        capability: compute capability it holds for.
        recipes: recipes it holds for, as they are printed ("tensor", "row", "block 128x128").
        m_min, m_max: rows of the output it holds for, both included.
        order: backends, the fastest first.
        evidence: the result file that shows it.
    """

    capability: tuple[int, int]
    recipes: tuple[str, ...]
    m_min: int
    m_max: int
    order: tuple[str, ...]
    evidence: str


@functools.cache
def measured() -> tuple[Route, ...]:
    """The routes of `routes.json`; the first one that fits a call holds."""
    text = resources.files("fp8dispatch").joinpath("routes.json").read_text("utf-8")
    return tuple(
        Route(
            tuple(entry["capability"]),
            tuple(entry["recipes"]),
            entry["m_min"],
            entry["m_max"],
            tuple(entry["order"]),
            entry["evidence"],
        )
        for entry in json.loads(text)["routes"]
    )


# Where nothing was measured: the vendor's GEMM, then our kernels, then the optional libraries,
# whose adapters have not been timed yet. TorchAO is the last of them on Hopper, since it times 48
# configurations at the first call of each size; away from Hopper the others' block kernels do not
# run at all. Last are those that a call must name to get.
_NAMED = ("fbgemm_tile", "mslk_tile")
_HOPPER = ("cublaslt", "triton", "fbgemm", "mslk", "deepgemm", "torchao", *_NAMED)
_OTHERS = ("cublaslt", "triton", "torchao", "fbgemm", "mslk", "deepgemm", *_NAMED)


def order_for(
    problem: LinearProblem, machine: Machine, known: tuple[str, ...]
) -> tuple[tuple[str, ...], str]:
    """Every known backend in the order to try them, and where the order comes from.

    Args:
        known: the registered backends; what an order does not name follows in their order.
    """
    if machine.device_type != "cuda":
        # Off the GPU plain torch comes first: the others run in an interpreter at best.
        return _complete(("eager",), known), "plain torch first off the GPU"
    recipe = str(problem.recipe)
    for route in measured():
        if (
            machine.capability == route.capability
            and recipe in route.recipes
            and route.m_min <= problem.m <= route.m_max
        ):
            return _complete(route.order, known), f"measured, {route.evidence}"
    hopper = machine.capability == (9, 0)
    return _complete(_HOPPER if hopper else _OTHERS, known), "default"


def _complete(order: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    named = tuple(name for name in order if name in known)
    return (*named, *(name for name in known if name not in named))
