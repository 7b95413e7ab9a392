"""The grouped Gluon kernel as a backend: what it refuses, and where it comes first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fp8dispatch import BackendUnavailableError, registry, routes
from fp8dispatch.errors import Refusal
from fp8dispatch.kernels.hopper_experts_config import LONGEST_ROW
from fp8dispatch.moe.backends.gluon import BACKEND
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests.backends.cases import A100, B200, CPU, GROUPS, H200, ROCM_9_0, having, told
from tests.moe.cases import make_call

PROBLEM = ExpertsProblem(
    8192, 4096, 7168, BLOCK_128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16", experts=8
)


def test_it_runs_on_hopper_with_a_known_triton_alone() -> None:
    assert BACKEND.refuse_machine(H200) == ()
    for machine in (A100, B200, CPU, ROCM_9_0, having(H200, triton="3.5.1")):
        assert BACKEND.refuse_machine(machine)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"recipe": ROW, "has_bias": True, "out_dtype": "float32", "n": 4099}, []),
        ({"recipe": TENSOR, "static_activation": True, "static_per_expert": True}, []),
        ({"batched": True, "gathers": True, "m": 3, "experts": 1}, []),
        ({"weight_contiguous": False}, []),
        ({"m": 2**24, "n": 2**14}, []),
        ({"k": 7176}, ["align-k: needs K a multiple of 16, found K=7176"]),
        ({"recipe": GROUPS}, ["block-size: needs blocks 128x128, found block 1x128"]),
        ({"weight_row_major": False}, ["layout: needs row-major weights [E, N, K], found other "
                                       "strides"]),
        ({"aligned": False}, ["alignment: needs weight memory and rows aligned to 16 bytes, found "
                              "an odd address or row stride"]),
        ({"recipe": Recipe(Granularity.BLOCK, (256, 128))}, ["block-size: needs blocks 128x128, "
                                                             "found block 256x128"]),
        ({"weight_dtype": "float8_e5m2"}, ["weight-dtype: needs weight dtype float8_e4m3fn, "
                                           "found float8_e5m2"]),
        (
            {"recipe": ROW, "k": LONGEST_ROW + 16},
            ["size: needs K up to 32768 where a row has one computed scale, found K=32784"],
        ),
        ({"recipe": ROW, "k": LONGEST_ROW + 16, "static_activation": True}, []),
        ({"k": LONGEST_ROW + 16}, []),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, object], expected: list[str]) -> None:
    problem = replace(PROBLEM, **changes)  # type: ignore[arg-type]
    assert told(BACKEND.refuse_problem(problem, H200)) == expected


def test_it_is_verified_with_one_triton() -> None:
    assert registry.load_experts("gluon") is BACKEND
    for version, verified in (("3.6.0", True), ("3.7.1", False)):
        machine = replace(H200, versions={**H200.versions, "triton": version})
        assert BACKEND.is_verified(machine) is verified


def test_it_stands_in_front_of_the_portable_kernels_where_an_expert_has_many_rows() -> None:
    many = routes.ROWS_OF_AN_EXPERT * PROBLEM.experts
    for m, machine, first in (
        (many, H200, ("gluon", "triton")),
        (many - 1, H200, ("triton", "gluon")),
        (many, B200, ("triton", "gluon")),
    ):
        order, _ = routes.order_for(replace(PROBLEM, m=m), machine, registry.NAMES)
        assert order[:2] == first, (m, machine)


def test_named_where_it_cannot_run_it_says_why() -> None:
    with pytest.raises(BackendUnavailableError, match="gluon needs a CUDA device of capability"):
        make_call("grouped", BLOCK_128, 3, 16, 144, 6).run(backend="gluon")


def test_what_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told_why = Refusal("import", "triton.experimental.gluon to import", "ImportError: planted")
    monkeypatch.setattr(type(BACKEND), "loadable", lambda self, recipe: (told_why,))
    with pytest.raises(BackendUnavailableError, match=r"gluon needs triton\.experimental"):
        BACKEND.require(BLOCK_128)
