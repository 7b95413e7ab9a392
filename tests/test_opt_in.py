"""A backend whose numbers are another recipe's runs where it is named, and nowhere else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import FP8Linear, decide, explain, fp8_linear, policy, registry, routes, trust
from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.eager import Eager
from fp8dispatch.backends.fbgemm_tile import FbgemmTile
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.policy import Policy
from fp8dispatch.problem import Accuracy
from fp8dispatch.recipe import BLOCK_128
from fp8dispatch.router import Decision, Standing, select
from tests import oracle
from tests.backends import fake_cutlass
from tests.backends.cases import BLOCK, H200, L40S, blocks

TILES = ("fbgemm_tile", "mslk_tile")
NAMED = ("weight_only", *TILES)
REASON = (
    'needs to be named (backend="fbgemm_tile"), since it scales activations in 128x128 tiles, '
    "which gives other numbers than one scale per token and 128 columns, found a call that does "
    "not name it"
)


def route(allowed: Policy, asked: list[str] | None = None, **changes: Any) -> Decision:
    """The decision of the real backends on an H200 where every library is right."""

    def judge(name: str) -> Standing:
        if asked is not None:
            asked.append(name)
        return Standing("right", "as tested", usable=True)

    problem = blocks(**changes)
    order, source = routes.order_for(problem, H200, registry.NAMES)
    return select(problem, H200, allowed, order, registry.load, judge, source)


@pytest.mark.parametrize("m", [1, 64, 4096])
@pytest.mark.parametrize("accuracy", list(Accuracy))
def test_no_default_order_gets_to_it(m: int, accuracy: Accuracy) -> None:
    decision = route(Policy(accuracy=accuracy), m=m, accuracy=accuracy)

    assert decision.backend not in TILES
    assert set(TILES).isdisjoint(decision.others)
    assert [str(reason) for reason in dict(decision.refusals)["fbgemm_tile"]] == [REASON]
    assert f"  fbgemm_tile {REASON}" in str(decision).splitlines()
    kept = {one["backend"]: one for one in json.loads(decision.as_json())["assessments"]}
    assert kept["fbgemm_tile"]["refusals"][0]["sentence"] == f"fbgemm_tile {REASON}"


def test_no_exclusion_gets_to_it() -> None:
    """Whatever else is excluded, and when nothing else is left."""
    # All of these run the call but the one that has expert matmuls alone.
    others = [name for name in registry.NAMES if name not in (*NAMED, "cutlass")]
    asked: list[str] = []
    for count in (1, 2, len(others) - 1):
        for excluded in itertools.combinations(others, count):
            assert route(Policy(excluded=excluded), asked).backend not in TILES
    assert set(TILES).isdisjoint(asked), "nobody asked for its numbers"

    with pytest.raises(BackendUnavailableError) as caught:
        route(Policy(excluded=tuple(others), source="use_backend"))
    assert f"fbgemm_tile {REASON}" in str(caught.value)


@pytest.mark.parametrize(
    ("only", "chosen"),
    [
        (("fbgemm_tile",), "fbgemm_tile"),
        (("mslk_tile", "triton"), "mslk_tile"),
        (("triton", "fbgemm_tile"), "triton"),
        (("cublaslt", "fbgemm_tile"), "fbgemm_tile"),
    ],
)
def test_a_statement_that_names_it_gets_it(only: tuple[str, ...], chosen: str) -> None:
    decision = route(Policy(only, source="argument backend="), n=4104)
    assert decision.backend == chosen
    assert "opt-in" not in [reason.code for _, reasons in decision.refusals for reason in reasons]


def test_its_other_refusals_are_told_beside_it() -> None:
    order, _ = routes.order_for(BLOCK, L40S, registry.NAMES)
    decision = select(BLOCK, L40S, Policy(), order, registry.load)
    codes = [reason.code for reason in dict(decision.refusals)["fbgemm_tile"]]
    assert codes == ["opt-in", "capability"]
    decision = route(Policy(), n=4100, has_bias=True)
    codes = [reason.code for reason in dict(decision.refusals)["fbgemm_tile"]]
    assert codes == ["opt-in", "align-n", "bias"]


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), None])
@pytest.mark.parametrize("recipe", ["tensor", "row", "block-128x128", "block-1x32"])
def test_they_are_last_before_plain_torch(capability: tuple[int, int] | None, recipe: str) -> None:
    problem = blocks(recipe=oracle.RECIPES[recipe])
    order, _ = routes.order_for(problem, replace(H200, capability=capability), registry.NAMES)
    assert order[-4:] == (*NAMED, "eager")


def test_shared_scales_must_be_opted_into() -> None:
    with pytest.raises(TypeError, match=r"Unsafe needs opt_in .*, found rows_per_scale=64"):
        type("Unsafe", (Eager,), {"rows_per_scale": 64})


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """`fbgemm_tile` over its stand-in on the CPU, first in the order, tested in this process."""
    backend = fake_cutlass.plant(FbgemmTile, monkeypatch)
    monkeypatch.setattr(type(backend), "refuse_machine", lambda *_: ())
    monkeypatch.setattr(type(backend), "verified_capabilities", (None,))  # what a CPU has
    monkeypatch.setattr(type(backend), "verified_versions", {})
    loaded: Any = registry.load
    monkeypatch.setattr(
        registry, "load", lambda name: backend if name == "fbgemm_tile" else loaded(name)
    )
    order = ("fbgemm_tile", "eager")
    monkeypatch.setattr(decide.routes, "order_for", lambda *_: (order, "as tested"))
    for variable in (policy.BACKEND_VARIABLE, policy.ACCURACY_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    forget()
    yield backend
    monkeypatch.undo()
    forget()


def forget() -> None:
    policy.reload_environment()
    fp8dispatch.set_backend()
    trust.forget()
    trust.clear_stored()
    decide.forget()


class Operands:
    """A call that the backend takes, and what it should give."""

    def __init__(self, m: int = 130) -> None:
        self.weight, self.scale = oracle.make_weight(264, 512, BLOCK_128)
        self.x = torch.randn(m, 512, dtype=torch.bfloat16)
        self.x[: m // 2, :128] *= 30
        self.call = (self.x, self.weight, self.scale)

    def truth(self, rows_per_scale: int) -> oracle.Truth:
        return oracle.linear_truth(*self.call, BLOCK_128, rows_per_scale=rows_per_scale)


@pytest.mark.usefixtures("tile")
def test_a_call_that_does_not_name_it_never_tests_it() -> None:
    operands = Operands()
    for statement in (None, "-triton", "eager", "eager,triton"):
        with nullcontext() if statement is None else fp8dispatch.use_backend(statement):
            assert explain(*operands.call).backend == "eager"
            oracle.assert_matches(fp8_linear(*operands.call), operands.truth(1))
    with (
        fp8dispatch.use_backend("-eager"),
        pytest.raises(BackendUnavailableError, match="fbgemm_tile needs to be named"),
    ):
        fp8_linear(*operands.call)
    assert fake_cutlass.CALLS.names == [], "not even its canary ran"


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(
    ("place", "statement"),
    [
        ("argument", "fbgemm_tile"),
        ("layer", "fbgemm_tile"),
        ("context", "fbgemm_tile"),
        ("context", "fbgemm_tile,eager"),
        ("process", "fbgemm_tile"),
        ("variable", "fbgemm_tile,eager"),
    ],
)
def test_every_place_can_name_it(
    place: str, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = Operands()
    if place == "argument":
        out = fp8_linear(*operands.call, backend=statement)
    elif place == "layer":
        layer = FP8Linear.from_tensors(operands.weight, operands.scale)
        layer.backend = statement
        out = layer(operands.x)
    elif place == "context":
        with fp8dispatch.use_backend(statement):
            out = fp8_linear(*operands.call)
    elif place == "process":
        fp8dispatch.set_backend(statement)
        out = fp8_linear(*operands.call)
    else:
        monkeypatch.setenv(policy.BACKEND_VARIABLE, statement)
        fp8dispatch.reload_environment()
        out = fp8_linear(*operands.call)

    oracle.assert_matches(out, operands.truth(128))
    with pytest.raises(AssertionError):  # these are other numbers than everybody else's
        oracle.assert_matches(out, operands.truth(1))
    assert len(fake_cutlass.CALLS.names) == 5, "its canary and the call"


@pytest.mark.usefixtures("tile")
def test_the_decision_says_who_named_it_and_how_its_numbers_are_known() -> None:
    decision = explain(*Operands().call, backend="fbgemm_tile")
    assert (decision.backend, decision.decided_by) == ("fbgemm_tile", "argument backend=")
    assert decision.standing is not None
    assert decision.standing.verdict == "right", decision


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("m", [0, 1, 5, 128, 257])
def test_every_number_of_rows_and_its_gradient(m: int) -> None:
    operands = Operands(m)
    x = operands.x.clone().requires_grad_()
    out = fp8_linear(x, operands.weight, operands.scale, backend="fbgemm_tile")
    out.sum().backward()

    assert out.shape == (m, 264)
    if m:
        oracle.assert_matches(out, operands.truth(128))
    wide = oracle.dequantized_weight(operands.weight, operands.scale, BLOCK_128)
    assert x.grad is not None
    oracle.assert_gradient(x.grad, torch.ones_like(out), wide)


@pytest.mark.usefixtures("tile")
def test_what_it_cannot_scale_itself_is_refused_or_the_next_ones() -> None:
    operands = Operands()
    x, weight, scale = operands.call
    quantized = fp8dispatch.QuantizedActivation.from_tensor(x, group_size=128)
    with pytest.raises(BackendUnavailableError, match=r"fbgemm_tile needs activations that it"):
        fp8dispatch.fp8_linear_quantized(quantized, weight, scale, backend="fbgemm_tile")
    with pytest.raises(BackendUnavailableError, match="fbgemm_tile needs dynamic activations"):
        fp8_linear(*operands.call, activation_scale=torch.ones(1), backend="fbgemm_tile")
    with fp8dispatch.use_backend("fbgemm_tile,eager"):
        out = fp8dispatch.fp8_linear_quantized(quantized, weight, scale)
    oracle.assert_matches(out, operands.truth(1))
