"""DeepGEMM's grouped GEMM: refusals, and the adapter over a fake that asserts what it is given."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fp8dispatch import BackendUnavailableError, registry
from fp8dispatch.backends.deepgemm import BACKEND as LINEAR
from fp8dispatch.moe.aligned import align_rows
from fp8dispatch.moe.backends.deepgemm import DeepGemm
from fp8dispatch.moe.execute import ExpertsCall, decoded_weights, describe_call, route_of
from fp8dispatch.moe.routing import Routing
from fp8dispatch.policy import Policy
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.recipe import BLOCK_128, ROW
from tests import oracle
from tests.backends.cases import B200, H200, told
from tests.moe.cases import Call, make_call

PROBLEM = ExpertsProblem(
    64, 4096, 7168, BLOCK_128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16", experts=8
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module that computes, and asserts layouts, as the real one does."""
    module = types.ModuleType("deep_gemm")

    def grouped(
        a: tuple[torch.Tensor, torch.Tensor],
        b: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        m_indices: torch.Tensor,
        *,
        disable_ue8m0_cast: bool,
    ) -> None:
        (data, scale), (weight, weight_scale) = a, b
        assert disable_ue8m0_cast
        assert data.shape[0] % 128 == 0
        assert m_indices.dtype == torch.int32
        assert data.is_contiguous()
        assert weight.is_contiguous()
        assert scale.stride() == (1, data.shape[0])
        for tile in m_indices.reshape(-1, 128):
            assert tile[tile >= 0].unique().numel() <= 1, "a tile of two experts"
        for row, expert in enumerate(m_indices.tolist()):
            if expert >= 0:
                spread = scale[row].repeat_interleave(128)[: data.shape[1]]
                wide = oracle.dequantized_weight(weight[expert], weight_scale[expert], BLOCK_128)
                out[row] = (data[row].double() * spread.double()) @ wide.t()

    module.m_grouped_fp8_gemm_nt_contiguous = grouped  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    monkeypatch.setattr(LINEAR, "_load_refusals", ())
    yield module


def run(call: Call) -> torch.Tensor:
    named, batched = call.arguments, call.way.startswith("batched")
    index = named["expert_ids" if batched else "offsets"]
    routing = route_of(
        named["x"].shape[0],
        named["weight"].shape[0],
        index,
        named.get("gather"),
        named.get("scatter"),
        batched=batched,
    )
    described = ExpertsCall(BLOCK_128, torch.bfloat16, Policy(), batched)
    static = named.get("activation_scale")
    problem = describe_call(routing, named["weight"], described, None, static)
    weights = decoded_weights(named["weight"], named["weight_scale"], BLOCK_128)
    every = None if static is None else static.expand(named["weight"].shape[0])
    return DeepGemm().experts(named["x"], weights, None, every, routing, problem)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("way", ["batched", "batched-gather", "grouped", "grouped-index"])
@pytest.mark.parametrize("static", ["none", "one"])
def test_rows_reach_their_places_and_come_back(way: str, static: str) -> None:
    call = make_call(way, BLOCK_128, 4, 136, 144, 150, static=static)

    oracle.assert_matches(run(call), call.truth(), min_sqnr=-math.inf)


@pytest.mark.usefixtures("library")
def test_all_rows_on_one_expert_and_none() -> None:
    for sentinels in (0.0, 1.1):
        call = make_call("grouped", BLOCK_128, 3, 16, 144, 130, sentinels=sentinels)
        oracle.assert_matches(run(call), call.truth(), min_sqnr=-math.inf)


def test_a_release_without_the_entry_is_refused(library: types.ModuleType) -> None:
    del library.m_grouped_fp8_gemm_nt_contiguous
    with pytest.raises(BackendUnavailableError, match=r"needs deep_gemm\.m_grouped"):
        run(make_call("grouped", BLOCK_128, 3, 16, 144, 6))


@pytest.mark.parametrize("experts", [1, 3, 40])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_there_are_places_for_every_routing(experts: int, rows: int) -> None:
    ids = torch.randint(-1, experts + 1, (rows,))
    for chosen in (ids, torch.zeros_like(ids), torch.arange(rows) % experts):
        routing = Routing(experts, rows, rows, expert_ids=chosen)
        places = align_rows(routing.sort(use_kernels=False), rows, 8)

        filled = places.expert >= 0
        named = sorted(places.source[filled].tolist())
        assert named == [row for row, e in enumerate(chosen.tolist()) if 0 <= e < experts]
        assert torch.equal(chosen[places.source[filled]], places.expert[filled].long())
        assert torch.equal(places.source[filled], places.target[filled])
        assert set(places.target[~filled].tolist()) <= {rows}
        for tile in places.expert.reshape(-1, 8):
            assert tile[tile >= 0].unique().numel() <= 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"recipe": ROW}, ["recipe: needs a block recipe, found row"]),
        (
            {"static_activation": True, "static_per_expert": True},
            ["static: needs one activation scale for all experts, or none, found 8 of them"],
        ),
        (
            {"m": 2**19},
            [
                "size: needs padded rows below 2**31 elements (32-bit offsets), found 525312 rows "
                "of 7168"
            ],
        ),
        (
            {"weight_contiguous": False},
            ["contiguous: needs a contiguous weight (make it contiguous once), found gaps between "
             "its rows"],
        ),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, object], expected: list[str]) -> None:
    problem = replace(PROBLEM, **changes)  # type: ignore[arg-type]
    found = told(DeepGemm().refuse_problem(problem, H200))

    assert [one for one in found if "M x" not in one] == expected


def test_it_is_not_verified_and_stands_behind_our_kernels() -> None:
    backend = registry.load_experts("deepgemm")

    assert backend.refuse_machine(H200) == ()
    assert backend.refuse_machine(B200)
    assert not backend.is_verified(H200)
