"""The order of backends: measured where it was, stated elsewhere, complete everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fp8dispatch import registry, routes
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe

KNOWN = ("fbgemm", "mslk", "deepgemm", "cublaslt", "torchao", "triton", "plugin", "eager")
PROBLEM = LinearProblem(64, 4096, 7168, BLOCK_128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16")
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
    problem = replace(PROBLEM, recipe=TENSOR)
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
    order, _ = routes.order_for(replace(PROBLEM, recipe=TENSOR), cuda(capability), known)
    assert order[-4:] == ("fbgemm_tile", "mslk_tile", "plugin", "eager")


def test_every_measured_route_names_known_backends_and_an_existing_result_file() -> None:
    root = Path(__file__).parent.parent
    assert routes.measured()
    for number, route in enumerate(routes.measured()):
        assert (root / route.evidence).is_file(), route
        assert set(route.order) <= set(registry.NAMES), route
        assert route.m_min <= route.m_max
        if number and route.m_max > 1 << 62:
            continue  # the first rows of an open range belong to the routes before it
        problem = replace(PROBLEM, m=route.m_min, recipe=_recipe(route.recipes[0]))
        order, told = routes.order_for(problem, cuda(route.capability), registry.NAMES)
        assert order[: len(route.order)] == route.order
        assert route.evidence in told


def _recipe(text: str) -> Recipe:
    known = (TENSOR, ROW, BLOCK_128, Recipe(Granularity.BLOCK, (1, 128)))
    return next(recipe for recipe in known if str(recipe) == text)


def test_the_first_route_that_fits_holds() -> None:
    known = registry.NAMES
    for m, recipe, first in [
        (1, ROW, "triton"),
        (64, ROW, "triton"),
        (65, ROW, "cublaslt"),
        (1, BLOCK_128, "triton"),
        (2, BLOCK_128, "cublaslt"),
        (4096, BLOCK_128, "cublaslt"),
    ]:
        order, _ = routes.order_for(replace(PROBLEM, m=m, recipe=recipe), cuda((9, 0)), known)
        assert order[0] == first, (m, recipe)
