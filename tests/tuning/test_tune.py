"""Tuning from end to end: what is timed, what is chosen, and who is heard before it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import decide, policy, registry
from fp8dispatch.errors import (
    UnknownBackendError,
)
from fp8dispatch.overrides import set_backend, use_backend
from tests.tuning.cases import SCALE, WEIGHT, K, N, X, explained, states, tune
from tests.tuning.conftest import Workbench, start_anew


def test_the_fastest_is_chosen_and_calls_follow_it(bench: Workbench, home: Path) -> None:
    bench.plant("slow", 90.0)
    swift = bench.plant("swift", 10.0)
    assert explained().backend == "eager"
    expected = fp8dispatch.fp8_linear(X, WEIGHT, SCALE)

    report = tune(bench)

    (point,) = report.points
    assert point.order == ("swift", "slow", "eager")
    assert (point.before, point.us["eager"], point.us["swift"]) == ("eager", 100.0, 10.0)
    assert report.file is not None
    assert report.file.parent == home / "tuned"
    decision = explained()
    assert (decision.backend, decision.decided_by) == ("swift", "default")
    assert re.fullmatch(rf"tuned, {re.escape(str(report.file))}, \d{{4}}-\d\d-\d\d", decision.route)
    swift.calls.clear()
    assert torch.equal(fp8dispatch.fp8_linear(X, WEIGHT, SCALE), expected)
    assert swift.calls == [(3, N, K)]


def test_a_call_that_was_remembered_before_follows_as_well(bench: Workbench) -> None:
    """The warm path keeps the decision of a repeated call; a tuning renews it."""
    swift = bench.plant("swift", 10.0)
    for _ in range(3):
        fp8dispatch.fp8_linear(X, WEIGHT, SCALE)
    assert swift.calls == []

    tune(bench)
    swift.calls.clear()
    fp8dispatch.fp8_linear(X, WEIGHT, SCALE)

    assert len(swift.calls) == 1


def test_another_process_finds_the_order_on_disk(bench: Workbench) -> None:
    bench.plant("swift", 10.0)
    tune(bench)

    start_anew()

    assert explained().backend == "swift"


def test_the_warm_path_asks_for_no_tuned_order(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.plant("swift", 10.0)
    tune(bench)
    fp8dispatch.fp8_linear(X, WEIGHT, SCALE)

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("a repeated call looked for tuned orders")

    monkeypatch.setattr(decide.orders, "find", asked)
    fp8dispatch.fp8_linear(X, WEIGHT, SCALE)
    fp8dispatch.fp8_linear(X, WEIGHT, SCALE)


def test_ties_within_the_noise_go_to_the_default_order(bench: Workbench) -> None:
    bench.plant("close", 98.0)
    bench.plant("closer", 97.5)  # eager takes 2.6 % longer

    (point,) = tune(bench).points

    assert point.order == ("eager", "close", "closer")
    assert explained().backend == "eager"


def test_noise_that_was_measured_widens_the_band(bench: Workbench) -> None:
    turns = {"count": 0}

    def restless(_: int) -> float:
        turns["count"] += 1
        return 80.0 + 10.0 * (turns["count"] % 4)  # 80 to 110

    bench.plant("restless", restless)

    (point,) = tune(bench).points

    arm = next(arm for arm in point.arms if arm.backend == "restless")
    assert arm.spread is not None
    assert arm.spread > 0.05
    assert arm.us is not None
    assert arm.us < 100
    assert point.order == ("eager", "restless")


def test_each_bucket_has_its_own_order_and_no_other(bench: Workbench) -> None:
    bench.plant("short", lambda m: 10.0 if m <= 16 else 500.0)
    bench.plant("tall", lambda m: 500.0 if m <= 16 else 10.0)

    tune(bench, (N, K), tokens=(4, 256))

    def chosen(rows: int) -> str:
        return explained(torch.zeros(rows, K, dtype=torch.bfloat16)).backend

    assert [chosen(m) for m in (2, 3, 4)] == ["short"] * 3
    assert [chosen(m) for m in (65, 200, 256)] == ["tall"] * 3
    assert [chosen(m) for m in (1, 5, 64, 257)] == ["eager"] * 4, "nothing was measured there"
    other, scale = fp8dispatch.quantize(torch.randn(N, K + 8))
    x = torch.zeros(4, K + 8, dtype=torch.bfloat16)
    assert fp8dispatch.explain(x, other, scale).backend == "eager"
    row, scale = fp8dispatch.quantize(torch.randn(N, K), "row")
    assert fp8dispatch.explain(X, row, scale).backend == "eager", "another recipe"


def test_what_the_user_states_comes_before_what_was_tuned(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.plant("swift", 10.0)
    bench.plant("medium", 50.0)
    tune(bench)

    def decided(**options: Any) -> tuple[str, str]:
        decision = explained(**options)
        return decision.backend, decision.decided_by

    assert decided() == ("swift", "default")
    assert decided(backend="eager") == ("eager", "argument backend=")
    monkeypatch.setenv(policy.BACKEND_VARIABLE, "medium")
    policy.reload_environment()
    assert decided() == ("medium", policy.BACKEND_VARIABLE)
    set_backend("eager,medium")
    assert decided() == ("eager", "set_backend")
    with use_backend("medium,eager"):
        assert decided() == ("medium", "use_backend")
        assert decided(backend="eager") == ("eager", "argument backend=")
    set_backend("-swift")
    assert decided() == ("medium", "set_backend"), "the tuned order, without what is excluded"
    assert explained().route.startswith("tuned, ")
    set_backend()
    monkeypatch.delenv(policy.BACKEND_VARIABLE)
    policy.reload_environment()
    assert decided() == ("swift", "default")


def test_a_variable_turns_tuned_orders_off(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.plant("swift", 10.0)
    tune(bench)
    assert explained().backend == "swift"

    for text, chosen in (("0", "eager"), ("1", "swift"), ("off", "eager"), ("", "swift")):
        monkeypatch.setenv(policy.TUNED_VARIABLE, text)
        policy.reload_environment()
        assert explained().backend == chosen, text


def test_batch_invariant_calls_ignore_tuned_orders(bench: Workbench) -> None:
    bench.plant("swift", 10.0, batch_invariant=True)
    bench.backends["swift"].batch_invariant = True  # type: ignore[misc]
    tune(bench)

    with use_backend(batch_invariant=True):
        decision = explained(backend=None)

    assert not decision.route.startswith("tuned")
    assert decision.backend != "swift" or decision.route == "plain torch first off the GPU"


def test_tuning_under_a_statement_measures_plain_calls(bench: Workbench) -> None:
    bench.plant("swift", 10.0)
    bench.plant("excluded", 1.0)

    with use_backend("eager", batch_invariant=True), torch.inference_mode(), torch.autocast("cpu"):
        (point,) = tune(bench).points
    assert point.order == ("excluded", "swift", "eager")

    with use_backend("-excluded"):
        (point,) = tune(bench).points
    assert point.order == ("swift", "eager")
    assert "excluded" not in states(point)


def test_a_class_of_accumulation_has_its_own_orders(bench: Workbench) -> None:
    bench.plant("swift", 10.0)
    with use_backend(accuracy="fast"):
        assert tune(bench).accuracy == "fast"
        assert explained().backend == "swift"
    assert explained().backend == "eager"


def test_backends_can_be_named_and_left_out(bench: Workbench) -> None:
    bench.plant("swift", 10.0)
    bench.plant("swifter", 1.0)

    (named,) = tune(bench, backends="swift,eager").points
    (others,) = tune(bench, backends="-swifter").points

    assert set(states(named)) == {"swift", "eager"}
    assert named.order == others.order == ("swift", "eager")
    assert "swifter" not in states(others)
    with pytest.raises(UnknownBackendError, match="found 'swiftest'"):
        tune(bench, backends="swiftest")


def test_sizes_that_are_tuned_again_replace_the_old_and_keep_the_rest(bench: Workbench) -> None:
    swift = bench.plant("swift", 10.0)
    tune(bench, (3, N, K), (100, N, K))

    swift.speed = lambda _: 300.0
    tune(bench, (3, N, K))

    assert explained().backend == "eager"
    assert explained(torch.zeros(100, K, dtype=torch.bfloat16)).backend == "swift"


def test_a_model_is_tuned_by_its_config(bench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96,'
        ' "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}',
        "utf-8",
    )

    report = tune(bench, tmp_path, tokens=(1, 2))

    sizes = {(point.size.m, point.size.n, point.size.k) for point in report.points}
    shapes = {(64, 64), (32, 64), (96, 64), (64, 96)}
    assert sizes == {(m, n, k) for m in (1, 2) for n, k in shapes}


def test_the_interpreted_kernels_are_timed_beside_plain_torch() -> None:
    """No planted backend and no injected timer: the whole path as it is."""
    from fp8dispatch.probes.device import describe

    if not describe(torch.device("cpu")).triton_interpreter:
        pytest.skip("needs TRITON_INTERPRET=1")

    report = fp8dispatch.tune((2, 16, 32), device="cpu", progress=False, backends="triton,eager")

    (point,) = report.points
    own = {arm.backend: arm.state for arm in point.arms if arm.tile is None}
    assert own == {"eager": "timed", "triton": "timed"}
    assert len(point.arms) > 2, "and other tiles"
    assert all(us > 0 for us in point.us.values())
    assert report.as_dict()["points"][0]["order"] == list(point.order)


def test_nothing_registered_is_forgotten_in_a_tuned_order(bench: Workbench) -> None:
    bench.plant("swift", 10.0)
    tune(bench, backends="swift")

    decision = explained()

    assert {one.backend for one in decision.assessments} == set(registry.NAMES)
    assert decision.assessments[0].backend == "swift"
