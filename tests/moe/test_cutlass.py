"""Torch's own grouped GEMM: a test per refusal, and the adapter over its checks."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch

from fp8dispatch import decide, registry, trust
from fp8dispatch.machine import Machine
from fp8dispatch.moe.backends.cutlass import BACKEND, Cutlass
from fp8dispatch.problem import Accuracy
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Recipe
from fp8dispatch.trust import Verdict
from tests import oracle
from tests.backends.cases import A100, B200, CPU, H200, MI300X, RTX_5090, having, told
from tests.moe import fake_grouped
from tests.moe.cases import WAYS, make_call
from tests.moe.library import BIAS, CONTIGUOUS, STATIC, routed, run

HOPPER = "capability: needs a CUDA device of capability 9.0"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Cutlass:
    module = "fp8dispatch.moe.backends.compute.cutlass"
    monkeypatch.setattr(f"{module}.scaled_grouped_mm", fake_grouped.scaled_grouped_mm)
    monkeypatch.setattr(f"{module}.on_device", fake_grouped.guard)
    monkeypatch.setattr(fake_grouped, "SEEN_FAST", [])
    return Cutlass()


def test_the_fake_is_called_as_torch_is() -> None:
    real = inspect.signature(torch.nn.functional.scaled_grouped_mm).parameters
    fake = inspect.signature(fake_grouped.scaled_grouped_mm).parameters

    assert list(real)[:6] == list(fake)[:6]
    assert set(fake) <= set(real)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("static", ["none", "one"])
@pytest.mark.parametrize("recipe", [ROW, TENSOR], ids=str)
def test_rows_reach_their_places_and_come_back(
    backend: Cutlass, recipe: Recipe, way: str, static: str
) -> None:
    call = make_call(way, recipe, 4, 144, 208, 50, static=static)

    oracle.assert_matches(run(backend, call), call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize(("rows", "experts"), [(1, 5), (9, 40), (130, 1)])
def test_any_number_of_rows_and_experts(backend: Cutlass, rows: int, experts: int) -> None:
    for sentinels, concentrated in ((0.0, True), (0.5, False), (1.1, False)):
        call = make_call(
            "batched", ROW, experts, 16, 32, rows, sentinels=sentinels, concentrated=concentrated
        )
        oracle.assert_matches(run(backend, call), call.truth(), min_sqnr=-math.inf)


def test_offsets_that_fall_are_made_to_rise(backend: Cutlass) -> None:
    call = make_call("grouped", ROW, 4, 16, 32, 12, sentinels=0)
    call.arguments["offsets"] = torch.tensor([5, 3, 90, -7], dtype=torch.int32)

    out = run(backend, call)

    call.owners = [0] * 5 + [2] * 7
    oracle.assert_matches(out, call.truth(), min_sqnr=-math.inf)


def test_no_input_gives_zeros(backend: Cutlass) -> None:
    call = make_call("batched-gather", ROW, 3, 16, 32, 4)
    call.arguments["x"] = call.arguments["x"][:0]

    assert not run(backend, call).any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_names_it_runs_on_it_with_gradients(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKEND, "refuse_machine", lambda machine: ())
    right = Verdict("right", "as planted", "disk")
    monkeypatch.setattr(trust, "judge", lambda *asked, **named: right)
    decide.forget()
    call = make_call(way, ROW, 4, 144, 208, 50)
    x = call.arguments["x"].requires_grad_()

    out = call.run(backend="cutlass")
    out.sum().backward()
    decide.forget()

    assert fake_grouped.SEEN_FAST == [False]
    oracle.assert_matches(out, call.truth(), min_sqnr=-math.inf)
    reached = {source for _, source, _ in call.reached()}
    assert x.grad is not None
    assert set(x.grad.any(1).nonzero().flatten().tolist()) == reached


@pytest.mark.parametrize("accuracy", Accuracy)
def test_fast_accumulation_is_only_what_the_policy_allows(
    backend: Cutlass, accuracy: Accuracy
) -> None:
    run(backend, make_call("grouped", ROW, 3, 16, 32, 4), accuracy)

    assert [accuracy is Accuracy.FAST] == fake_grouped.SEEN_FAST


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (H200, []),
        (having(H200, torch="2.9.1"), ["version: needs torch >= 2.10, found 2.9.1"]),
        (A100, [f"{HOPPER}, found {A100}"]),
        (B200, [f"{HOPPER}, found {B200}"]),
        (RTX_5090, [f"{HOPPER}, found {RTX_5090}"]),
        (CPU, [f"{HOPPER}, found cpu"]),
        (MI300X, [f"{HOPPER}, found ROCm on {MI300X}"]),
    ],
)
def test_machine(machine: Machine, expected: list[str]) -> None:
    assert told(BACKEND.refuse_machine(machine)) == expected


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (routed(ROW), []),
        (routed(TENSOR, accuracy=Accuracy.FAST, batched=True), []),
        (routed(BLOCK_128), ["recipe: needs a row or tensor recipe, found block 128x128"]),
        (routed(ROW, has_bias=True), [BIAS]),
        (routed(ROW, static_activation=True, static_per_expert=True), [STATIC]),
        (routed(ROW, weight_contiguous=False), [CONTIGUOUS]),
        (
            routed(ROW, weight_row_major=False),
            ["layout: needs a row-major weight [N, K], found other strides"],
        ),
        (
            routed(ROW, experts=1024),
            [
                "experts: needs at most 1023 experts (one thread of a block prepares each), found "
                "1024"
            ],
        ),
        (routed(ROW, n=4104), ["align-n: needs N a multiple of 16, found N=4104"]),
        (routed(ROW, k=7176), ["align-k: needs K a multiple of 16, found K=7176"]),
        (routed(ROW, out_dtype="float32"), ["out-dtype: needs out dtype bfloat16, found float32"]),
        (
            routed(ROW, batch_invariant=True),
            [
                "batch-invariance: needs a policy without batch_invariant (how it sums depends on "
                "the number of rows), found batch_invariant=True"
            ],
        ),
    ],
)
def test_call(problem: object, expected: list[str]) -> None:
    assert told(BACKEND.refuse_problem(problem, H200)) == expected  # type: ignore[arg-type]


def test_it_has_no_linear_and_is_verified_with_one_torch() -> None:
    (refusal,) = registry.load("cutlass").refuse_machine(H200)

    assert str(refusal) == "needs an expert matmul, found a linear layer"
    assert registry.load_experts("cutlass") is BACKEND
    for version, verified in (("2.11.0+cu130", True), ("2.12.0", False)):
        machine = replace(H200, versions={**H200.versions, "torch": version})
        assert BACKEND.is_verified(machine) is verified
