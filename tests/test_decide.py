"""Decisions are made once, said once, and made again without a backend that failed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import decide, fp8_linear, registry, trust
from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.eager import Eager
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.problem import LinearProblem
from fp8dispatch.router import Decision, select

X, W, SCALE = torch.ones(3, 8), torch.ones(4, 8).to(torch.float8_e4m3fn), torch.ones(1)


class Failing(Eager):
    """Computes until it is told to raise."""

    name = "failing"
    error: Exception | None = None

    def matmul(self, *args: Any) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return super().matmul(*args)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    """A backend called "failing", first in the order."""
    backend = Failing()
    loaded: Any = registry.load

    def load(name: str) -> Backend:
        return backend if name == "failing" else loaded(name)

    names = ("failing", *registry.NAMES)
    monkeypatch.setattr(registry, "load", load)
    monkeypatch.setattr(registry, "NAMES", names)
    monkeypatch.setattr(decide.routes, "order_for", lambda *_: (names, "as tested"))
    monkeypatch.setattr(trust, "judge", lambda *_, **__: trust.Verdict("right", "as tested", ""))
    monkeypatch.setattr(decide, "_decisions", {})
    monkeypatch.setattr(decide, "counters", decide.Counters())
    monkeypatch.setattr("fp8dispatch.execute.counters", decide.counters)
    yield backend
    trust.release()
    decide.forget()


def test_decision_is_made_once_for_calls_that_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def counting(problem: LinearProblem, *rest: Any) -> Decision:
        seen.append(problem.m)
        return select(problem, *rest)

    monkeypatch.setattr(decide, "_decisions", {})
    monkeypatch.setattr(decide, "select", counting)

    for rows in (3, 3, 5, 3, 5):
        fp8_linear(torch.ones(rows, 8), W, SCALE)
    fp8_linear(X, W, SCALE, backend="eager")  # another policy

    assert seen == [3, 5, 3]


def test_remembered_decisions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "_decisions", {})
    monkeypatch.setattr(decide, "_MAX_DECISIONS", 4)

    for rows in range(1, 10):
        fp8_linear(torch.ones(rows, 8), W, SCALE)

    assert 1 <= len(decide._decisions) <= 4


def test_a_backend_that_fails_is_put_aside_and_the_next_one_runs(failing: Failing) -> None:
    assert fp8dispatch.explain(X, W, SCALE).backend == "failing"
    failing.error = RuntimeError("kernel launch failed\nat line 3")

    with pytest.warns(RuntimeWarning, match="failing failed on .* kernel launch failed") as said:
        out = fp8_linear(X, W, SCALE)

    assert torch.equal(out, fp8_linear(X, W, SCALE, backend="eager"))
    assert len(said) == 1
    again = fp8dispatch.explain(X, W, SCALE)
    assert again.backend != "failing"
    assert "kernel launch failed" in str(dict(again.refusals)["failing"][0])
    fp8_linear(X, W, SCALE)  # no second warning: it would be an error here
    assert decide.stats()["fallbacks"] == 1


def test_a_quarantine_holds_for_its_recipe_alone(failing: Failing) -> None:
    failing.error = RuntimeError("boom")
    with pytest.warns(RuntimeWarning):
        fp8_linear(X, W, SCALE)

    assert fp8dispatch.explain(X, W, SCALE).backend != "failing"
    assert fp8dispatch.explain(X, W, torch.ones(4)).backend == "failing"


@pytest.mark.parametrize("forced", [False, True])
def test_out_of_memory_is_raised_and_never_quarantines(failing: Failing, forced: bool) -> None:
    failing.error = torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        fp8_linear(X, W, SCALE, backend="failing" if forced else None)

    failing.error = None
    assert fp8dispatch.explain(X, W, SCALE).backend == "failing"


def test_a_forced_backend_raises_its_own_error(failing: Failing) -> None:
    failing.error = RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fp8_linear(X, W, SCALE, backend="failing")

    failing.error = None
    assert fp8dispatch.explain(X, W, SCALE).backend == "failing", "nothing was put aside"


def test_a_lost_context_is_told_and_nothing_else_is_tried(failing: Failing) -> None:
    failing.error = RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(BackendUnavailableError, match=r"context is lost .* restart the process"):
        fp8_linear(X, W, SCALE)


def test_each_first_choice_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide, "_decisions", {})
    monkeypatch.setattr(decide, "_announced", set())
    with caplog.at_level(logging.INFO, logger="fp8dispatch"):
        for rows in (3, 3, 5):
            fp8_linear(torch.ones(rows, 8), W, SCALE)

    (record,) = caplog.records
    assert record.getMessage().startswith("eager runs M=3")


def test_stats_count_calls_and_cold_decisions(failing: Failing) -> None:
    for rows in (3, 3, 5):
        fp8_linear(torch.ones(rows, 8), W, SCALE)

    assert decide.stats() == {
        "calls": 3,
        "cold_decisions": 2,
        "cold_in_capture": 0,
        "fallbacks": 0,
        "chosen": {"failing": 2},
    }


def test_an_untested_backend_runs_only_where_it_is_known_to(
    failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(name: str, *_: Any, **__: Any) -> trust.Verdict:
        state = "untested" if name == "failing" else "not needed"
        return trust.Verdict(state, "out of memory", "as tested")

    monkeypatch.setattr(trust, "judge", judge)

    assert fp8dispatch.explain(X, W, SCALE).backend != "failing"
    with pytest.raises(BackendUnavailableError, match="untested ones: out of memory"):
        fp8_linear(X, W, SCALE, backend="failing")
    monkeypatch.setattr(Failing, "verified_capabilities", (None,))  # the CPU's capability
    decide.forget()
    assert fp8dispatch.explain(X, W, SCALE).backend == "failing"


def test_a_decision_is_not_kept_while_a_backend_could_not_be_tested(
    failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: dict[str, Any] = {"failing": "untested"}

    def judge(name: str, *_: Any, **__: Any) -> trust.Verdict:
        return trust.Verdict(state.get(name, "right"), "busy", "as tested")

    monkeypatch.setattr(trust, "judge", judge)
    assert fp8dispatch.explain(X, W, SCALE).backend != "failing"

    state["failing"] = "right"  # memory was free again at the next look

    assert fp8dispatch.explain(X, W, SCALE).backend == "failing"


@pytest.mark.parametrize("context", ["inference mode", "no grad", "autocast", "backward", "func"])
def test_a_first_call_is_judged_the_same_under_every_mode(
    context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary of a first call runs wherever that call stands, and must not notice."""

    class Known(Eager):
        name = "known"
        verified_capabilities = (None,)  # type: ignore[assignment]  # what a CPU has

    loaded: Any = registry.load
    backend = Known()
    monkeypatch.setattr(registry, "NAMES", ("known", *registry.NAMES))
    monkeypatch.setattr(registry, "load", lambda n: backend if n == "known" else loaded(n))
    trust.forget()
    trust.clear_stored()
    x = torch.randn(3, 256, requires_grad=context in ("backward", "autocast"))
    weight, scale = fp8dispatch.quantize(torch.randn(128, 256))

    def call(value: torch.Tensor) -> torch.Tensor:
        return fp8_linear(value, weight, scale, backend="known").sum()

    if context == "inference mode":
        with torch.inference_mode():
            call(x)
    elif context == "no grad":
        with torch.no_grad():
            call(x)
    elif context == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call(x).backward()
    elif context == "backward":
        call(x).backward()
    else:
        torch.func.grad(call)(x)

    decision = fp8dispatch.explain(x, weight, scale, backend="known")
    assert decision.standing is not None
    assert decision.standing.verdict == "right", decision
