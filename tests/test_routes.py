"""The order of backends: measured where it was, stated elsewhere, complete everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fp8dispatch import registry, routes
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

KNOWN = ("fbgemm", "mslk", "deepgemm", "cublaslt", "torchao", "triton", "plugin", "eager")
PROBLEM = LinearProblem(64, 4096, 7168, BLOCK_128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16")
NOT_MEASURED = Recipe(Granularity.BLOCK, (1, 32))
CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), None]


def cuda(capability: tuple[int, int] | None) -> Machine:
    return Machine("cuda", "GPU", capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("m", [0, 1, 64, 4096])
@pytest.mark.parametrize(
    "recipe", [TENSOR, ROW, BLOCK_128, Recipe(Granularity.BLOCK, (1, 32))], ids=str
)
def test_every_order_names_every_backend_once_and_eager_last(
    capability: tuple[int, int] | None, m: int, recipe: Recipe
) -> None:
    problem = replace(PROBLEM, m=m, recipe=recipe)
    order, route = routes.order_for(problem, cuda(capability), KNOWN)

    assert sorted(order) == sorted(KNOWN)
    assert order[-1] == "eager"
    assert route


def test_off_the_gpu_plain_torch_comes_first() -> None:
    order, _ = routes.order_for(PROBLEM, Machine("cpu"), KNOWN)
    assert order[0] == "eager"
    assert sorted(order) == sorted(KNOWN)


def test_where_nothing_is_measured_the_default_order_holds() -> None:
    problem = replace(PROBLEM, recipe=NOT_MEASURED)
    order, route = routes.order_for(problem, cuda((9, 0)), KNOWN)
    assert route == "default"
    assert order.index("fbgemm") < order.index("torchao") < order.index("triton")
    for capability in ((8, 9), (10, 0), (10, 3), (12, 0), (12, 1)):
        order, _ = routes.order_for(PROBLEM, cuda(capability), KNOWN)
        assert order.index("triton") < order.index("torchao"), capability


def test_a_route_can_hold_for_a_range_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    few = routes.Route((9, 0), ("row",), 65, 512, 0, 100, ("triton",), "few.json")
    many = replace(few, tiles_min=101, tiles_max=routes.NO_LIMIT, order=("fbgemm",))
    monkeypatch.setattr(routes, "measured", lambda: (few, many))
    for m, n, first in (
        (65, 12_800, "triton"),  # 1 x 100 tiles
        (128, 12_801, "fbgemm"),
        (129, 6_400, "triton"),  # 2 x 50
        (512, 3_328, "fbgemm"),  # 4 x 26
    ):
        problem = replace(PROBLEM, m=m, n=n, recipe=ROW)
        order, _ = routes.order_for(problem, cuda((9, 0)), KNOWN)
        assert order[0] == first, (m, n)
    order, route = routes.order_for(replace(PROBLEM, m=64, recipe=ROW), cuda((9, 0)), KNOWN)
    assert route == "default"


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_what_must_be_named_comes_last_of_ours(capability: tuple[int, int]) -> None:
    known = ("mslk_tile", "fbgemm_tile", *KNOWN)
    order, _ = routes.order_for(replace(PROBLEM, recipe=NOT_MEASURED), cuda(capability), known)
    assert order[-4:] == ("fbgemm_tile", "mslk_tile", "plugin", "eager")


def test_every_measured_route_names_known_backends_and_an_existing_result_file() -> None:
    root = Path(__file__).parent.parent
    assert routes.measured()
    for route in routes.measured():
        assert (root / route.evidence).is_file(), route
        assert set(route.order) <= set(registry.NAMES), route
        for problem in _smallest_and_largest(route):
            assert route.fits(problem, cuda(route.capability)), (route, problem)
            order, told = routes.order_for(problem, cuda(route.capability), registry.NAMES)
            assert order[: len(route.order)] == route.order, (route, problem)
            assert route.evidence in told


def _smallest_and_largest(route: routes.Route) -> Iterator[LinearProblem]:
    """Calls at both ends of a route's M and tiles, of each of its recipes."""
    known = (TENSOR, ROW, BLOCK_128, Recipe(Granularity.BLOCK, (1, 128)))
    for text in route.recipes:
        recipe = next(recipe for recipe in known if str(recipe) == text)
        m = max(route.m_min, 1)
        columns = routes.ceil_div(max(route.tiles_min, 1), routes.ceil_div(m, 128))
        yield replace(PROBLEM, m=m, n=128 * columns, recipe=recipe)
        # An open end is as good as a million.
        rows = routes.ceil_div(min(route.m_max, 10**6), 128)
        columns = max(1, min(route.tiles_max, 10**6) // rows)
        rows = min(rows, route.tiles_max)
        yield replace(PROBLEM, m=min(route.m_max, 128 * rows), n=128 * columns, recipe=recipe)


def test_the_first_route_that_fits_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    few = routes.Route((9, 0), ("row",), 0, 64, 0, routes.NO_LIMIT, ("triton",), "few.json")
    every = replace(few, m_max=routes.NO_LIMIT, order=("cublaslt",), evidence="every.json")
    for measured, first in (((few, every), "triton"), ((every, few), "cublaslt")):
        monkeypatch.setattr(routes, "measured", lambda measured=measured: measured)
        for m, expected in ((64, first), (65, "cublaslt")):
            order, _ = routes.order_for(replace(PROBLEM, m=m, recipe=ROW), cuda((9, 0)), KNOWN)
            assert order[0] == expected, (m, measured)


def test_our_gluon_kernels_come_first_but_for_the_largest_outputs() -> None:
    for m, n, recipe, first in [
        (1, 4096, ROW, ("gluon", "triton")),
        (129, 4096, ROW, ("gluon", "triton")),  # 2 x 32 tiles
        (513, 4096, ROW, ("gluon", "cublaslt")),
        (4096, 37_504, ROW, ("gluon", "cublaslt")),  # 32 x 293 tiles
        (4096, 37_632, ROW, ("cublaslt", "gluon")),  # 32 x 294
        (4096, 37_632, TENSOR, ("cublaslt", "gluon")),
        (4, 4096, BLOCK_128, ("gluon", "triton")),
        (5, 4096, BLOCK_128, ("gluon", "fbgemm")),
        (33, 4096, BLOCK_128, ("gluon", "deepgemm")),
        (4096, 37_632, BLOCK_128, ("gluon", "deepgemm")),
    ]:
        problem = replace(PROBLEM, m=m, n=n, recipe=recipe)
        order, _ = routes.order_for(problem, cuda((9, 0)), registry.NAMES)
        assert order[:2] == first, (m, n, recipe)
