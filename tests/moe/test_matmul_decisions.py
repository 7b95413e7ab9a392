"""Which backend runs an expert matmul: routed, explained and put aside apart from the linear's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fp8dispatch import BackendUnavailableError, decide, registry, routes, trust, use_backend
from fp8dispatch.machine import Machine
from fp8dispatch.moe.matmul import explain_experts
from fp8dispatch.policy import Policy
from fp8dispatch.problem import Accuracy, ExpertsProblem
from fp8dispatch.recipe import BLOCK_128, ROW
from fp8dispatch.router import select
from tests import oracle
from tests.moe.cases import make_call

PROBLEM = ExpertsProblem(
    64, 4096, 7168, BLOCK_128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16", experts=256
)
HOPPER = Machine("cuda", "NVIDIA H200", (9, 0), {"torch": "2.11.0", "triton": "3.6.0"})


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    trust.release()
    decide.forget()
    yield
    trust.release()
    decide.forget()


def simulated(problem: ExpertsProblem, machine: Machine) -> Any:
    order, route = routes.order_for(problem, machine, registry.NAMES)
    load = registry.load_experts
    return select(problem, machine, Policy(), order, load, None, route)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_every_gpu_with_triton_runs_our_kernels(capability: tuple[int, int]) -> None:
    decision = simulated(PROBLEM, replace(HOPPER, capability=capability))

    assert decision.backend == "triton"
    assert {one.backend for one in decision.assessments} == set(registry.NAMES)
    assert decision.assessments[-1].backend == "eager"


LIBRARIES = {
    "fbgemm-gpu-genai": "1.6.0",
    "mslk-cuda": "1.1.0",
    "sgl-deep-gemm": "0.1.5.post1",
}


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({}, ("gluon", "deepgemm", "fbgemm", "mslk", "eager")),
        ({"recipe": ROW}, ("gluon", "cutlass", "eager")),
        (
            {"recipe": ROW, "accuracy": Accuracy.FAST},
            ("gluon", "fbgemm", "mslk", "cutlass", "eager"),
        ),
        ({"has_bias": True}, ("gluon", "eager")),
        ({"n": 4104}, ("gluon", "deepgemm", "eager")),
        ({"experts": 1024, "recipe": ROW}, ("gluon", "eager")),
    ],
)
def test_libraries_stand_behind_our_kernels_in_a_stated_order(
    changes: dict[str, Any], others: tuple[str, ...]
) -> None:
    machine = replace(HOPPER, versions={**HOPPER.versions, **LIBRARIES})

    decision = simulated(replace(PROBLEM, **changes), machine)

    assert (decision.backend, decision.others) == ("triton", others)
    refused = dict(decision.refusals)
    for name in ("gluon", "deepgemm", "fbgemm", "mslk", "cutlass"):
        assert (name in refused) != (name in others)


def test_without_triton_plain_torch_is_named_as_what_runs() -> None:
    decision = simulated(PROBLEM, replace(HOPPER, versions={"torch": "2.11.0"}))

    assert decision.backend == "eager"
    assert "triton needs triton >=" in str(decision)


def test_measured_routes_of_linear_layers_do_not_hold_for_experts() -> None:
    linear = [route for route in routes.measured() if route.fits(PROBLEM, HOPPER)]
    order, route = routes.order_for(PROBLEM, HOPPER, registry.NAMES)

    assert linear  # the same sizes would have taken one
    assert route == "default"
    assert order[0] == "triton"


def test_an_explanation_names_the_call_and_every_backend() -> None:
    call = make_call("batched-gather", ROW, 5, 8, 16, 6, bias=torch.float32)
    arguments = {name: call.arguments[name] for name in ("x", "weight", "weight_scale", "bias")}

    decision = explain_experts(**arguments, batched=True, rows=6, gathers=True)

    assert str(decision).startswith("eager runs batched experts E=5 (gathers) M=6 N=8 K=16, row")
    assert "cublaslt needs an expert matmul, found linear layers only" in str(decision)
    assert "cutlass needs a CUDA device of capability 9.0, found cpu" in str(decision)
    assert "deepgemm needs sgl-deep-gemm" in str(decision)
    assert "fbgemm needs fbgemm-gpu-genai" in str(decision)
    assert decision.as_dict()["problem"]["experts"] == 5


def test_a_statement_for_linear_layers_holds_for_experts() -> None:
    call = make_call("grouped", ROW, 3, 8, 16, 4)
    with use_backend("cublaslt"), pytest.raises(BackendUnavailableError, match="cublaslt needs an"):
        call.run()
    with use_backend("cublaslt,triton"):
        decision = explain_experts(
            *(call.arguments[name] for name in ("x", "weight", "weight_scale")), batched=False
        )
    assert decision.backend == "triton"


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*call: Any) -> torch.Tensor:
        raise RuntimeError("planted failure")

    monkeypatch.setattr(registry.load_experts("triton"), "experts", fails)


def test_a_failing_backend_makes_way_and_the_linear_of_its_name_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch)
    call = make_call("grouped", ROW, 3, 8, 16, 4)
    with use_backend("triton,eager"):
        with pytest.warns(RuntimeWarning, match="the backend triton failed on grouped experts"):
            out = call.run()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = call.run()

    oracle.assert_matches(out, call.truth(), min_sqnr=0)
    assert torch.equal(out, again)
    assert [key[0] for key in trust.quarantines()] == ["experts.triton"]
    assert trust.quarantined("triton", torch.device("cpu"), ROW) is None


def test_a_forced_backend_raises_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)
    with pytest.raises(RuntimeError, match="planted failure"):
        make_call("grouped", ROW, 3, 8, 16, 4).run(backend="triton")


def test_a_forced_backend_that_refuses_says_so_also_without_rows() -> None:
    with pytest.raises(BackendUnavailableError, match=re.escape("torchao needs an expert matmul")):
        make_call("batched", ROW, 3, 8, 16, 0).run(backend="torchao")


def test_names_with_experts_lead_to_their_own_backend() -> None:
    assert registry.find("experts.triton") is registry.load_experts("triton")
    assert registry.find("triton") is registry.load("triton")
    assert registry.load_experts("triton") is not registry.load("triton")
