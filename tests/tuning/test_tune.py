"""Tuning from end to end: what is timed, what is chosen, and who is heard before it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import decide, policy, registry
from fp8dispatch.errors import (
    BackendUnavailableError,
    DeviceError,
    InvalidInputError,
    UnknownBackendError,
)
from fp8dispatch.overrides import set_backend, use_backend
from fp8dispatch.probes.numerics import poison
from fp8dispatch.recipe import Granularity, Recipe
from fp8dispatch.tuning.measure import Point
from tests.tuning.conftest import Workbench, start_anew

N, K = 24, 160
X = torch.randn(3, K, dtype=torch.bfloat16)
WEIGHT, SCALE = fp8dispatch.quantize(torch.randn(N, K))


def tune(bench: Workbench, *shapes: Any, **options: Any) -> fp8dispatch.TuningReport:
    options = {"device": "cpu", "timer": bench.timer, "progress": False, **options}
    return fp8dispatch.tune(shapes or [(3, N, K)], **options)


def explained(x: torch.Tensor = X, **options: Any) -> fp8dispatch.Decision:
    return fp8dispatch.explain(x, WEIGHT, SCALE, **options)


def states(point: Point) -> dict[str, str]:
    return {arm.backend: arm.state for arm in point.arms}


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


def scrambled(out: torch.Tensor, *_: Any) -> torch.Tensor:
    return out.roll(1, 1)


def one_wrong(out: torch.Tensor, *_: Any) -> torch.Tensor:
    out[-1, -1] += 3 * out.float().abs().max().to(out.dtype)
    return out


def unwritten(out: torch.Tensor, *_: Any) -> torch.Tensor:
    poisoned = torch.empty_like(out)
    poisoned[:-1] = out[:-1]
    return poisoned


def not_finite(out: torch.Tensor, *_: Any) -> torch.Tensor:
    out[0, 0] = torch.inf
    return out


def transposed(out: torch.Tensor, *_: Any) -> torch.Tensor:
    return out.t().contiguous().view(out.shape)


def scaled(out: torch.Tensor, *_: Any) -> torch.Tensor:
    return (out.float() * 1.25).to(out.dtype)


def changes_its_weight(out: torch.Tensor, x: Any, weight: Any, problem: Any) -> torch.Tensor:
    weight.data.view(torch.uint8)[0, 0] ^= 0x80
    return out


FAULTS = [scrambled, one_wrong, unwritten, not_finite, transposed, scaled, changes_its_weight]


@pytest.mark.parametrize(
    ("fault", "recipe"),
    [*((fault, "block") for fault in FAULTS), (one_wrong, "tensor"), (scaled, "row")],
)
def test_wrong_numbers_at_a_size_are_told_and_never_chosen(
    bench: Workbench, fault: Callable[..., torch.Tensor], recipe: str
) -> None:
    """Right in the canary, whose sizes differ, and wrong at the size that is tuned."""

    def at_this_size(out: torch.Tensor, x: Any, weight: Any, problem: Any) -> torch.Tensor:
        return fault(out, x, weight, problem) if problem.n == N else out

    bench.plant("broken", 1.0, fault=at_this_size)
    bench.plant("swift", 10.0)

    report = tune(bench, recipe=recipe)

    (point,) = report.points
    assert report.wrong == ("broken",)
    assert point.order == ("swift", "eager")
    weight, scale = fp8dispatch.quantize(torch.randn(N, K), recipe)
    x = torch.zeros(100, K, dtype=torch.bfloat16)
    with use_backend("-eager"):  # which comes first off the GPU where nothing was measured
        decision = fp8dispatch.explain(x, weight, scale)  # another bucket: wrong all the same
    assert decision.backend == "swift"
    (reason,) = dict(decision.refusals)["broken"]
    assert reason.code == "numbers"
    assert "tuning found" in reason.found
    with pytest.raises(BackendUnavailableError, match="tuning found"):
        fp8dispatch.fp8_linear(x, weight, scale, backend="broken")
    other, scale = fp8dispatch.quantize(torch.randn(N + 1, K), recipe)
    fp8dispatch.fp8_linear(x, other, scale, backend="broken")  # of another size nothing is known


def test_memory_is_poisoned_before_each_output(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    swift = bench.plant("swift", 10.0)

    def noted(out: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(out.shape))
        return out

    swift.fault = noted
    tune(bench, (3, 9, K))  # its canary runs now
    seen.clear()
    real: Any = poison
    monkeypatch.setattr(
        "fp8dispatch.tuning.measure.poison",
        lambda problem, device: (seen.append("poison"), real(problem, device)),
    )

    tune(bench, backends="swift")

    assert seen[:2] == ["poison", (3, N)]
    assert seen.count("poison") == 1


def test_a_backend_that_was_wrong_is_heard_again_when_tuned_again(bench: Workbench) -> None:
    broken = bench.plant("broken", 1.0, fault=lambda out, *rest: out * (rest[-1].n != N))
    assert tune(bench).wrong == ("broken",)

    broken.fault = None
    (point,) = tune(bench).points

    assert point.order[0] == "broken"
    assert explained().backend == "broken"


def test_all_of_a_large_output_is_checked(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The truth comes in strips of columns; a fault in any of them is found."""
    monkeypatch.setattr("fp8dispatch.tuning.operands._STRIP_ELEMENTS", 5 * K)

    def last_column(out: torch.Tensor, x: Any, weight: Any, problem: Any) -> torch.Tensor:
        if problem.n == N:
            out[:, -1] *= 1.5
        return out

    bench.plant("broken", 1.0, fault=last_column)
    bench.plant("swift", 10.0)

    (point,) = tune(bench, recipe=Recipe(Granularity.BLOCK, (7, 32))).points

    assert states(point)["broken"] == "wrong"
    assert re.match(r"from column 20 on, row \d, column 3 is", point.wrong["broken"])
    assert point.order == ("swift", "eager")


def test_what_the_router_refuses_is_not_timed(bench: Workbench) -> None:
    narrow = bench.plant("narrow", 1.0, align_n=16)
    named = bench.plant("named", 1.0, opt_in="it computes other numbers")
    distrusted = bench.plant("distrusted", 1.0, fault=lambda out, *_: out * 2)

    (point,) = tune(bench).points

    found = {arm.backend: arm for arm in point.arms}
    assert found["narrow"].reason == "narrow needs N a multiple of 16, found N=24"
    assert found["named"].reason.startswith('named needs to be named (backend="named")')
    assert re.match(
        "distrusted needs right numbers on this machine, found wrong ones: (linear|matmul) with",
        found["distrusted"].reason,
    )
    assert {found[name].state for name in ("narrow", "named", "distrusted")} == {"refused"}
    assert narrow.calls == named.calls == []
    assert (3, N, K) not in distrusted.calls, "it was wrong in the canary already"
    assert point.order == ("eager",)


@pytest.mark.parametrize("when", ["at once", "while it is timed"])
def test_a_backend_that_raises_is_told_and_the_others_go_on(bench: Workbench, when: str) -> None:
    def raises(out: torch.Tensor, *rest: Any) -> torch.Tensor:
        if rest[-1].n == N and (when == "at once" or bench.clock.timed > 2):
            raise RuntimeError("no kernel image")
        return out

    bench.plant("failing", 1.0, fault=raises)

    (point,) = tune(bench).points

    assert states(point)["failing"] == "failed"
    assert point.order == ("eager",)
    assert explained().backend == "eager"


def test_out_of_memory_of_one_backend_is_its_own(bench: Workbench) -> None:
    def greedy(out: torch.Tensor, *rest: Any) -> torch.Tensor:
        if rest[-1].n == N:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return out

    bench.plant("greedy", 1.0, fault=greedy)

    (point,) = tune(bench).points

    (arm,) = (arm for arm in point.arms if arm.backend == "greedy")
    assert (arm.state, arm.reason[:16]) == ("failed", "memory ran out: ")
    assert point.order == ("eager",)


def test_a_size_whose_operands_do_not_fit_is_passed_over(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = fp8dispatch.quantize

    def quantize(tensor: torch.Tensor, recipe: Any) -> Any:
        if tensor.shape[0] == 25:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(tensor, recipe)

    monkeypatch.setattr("fp8dispatch.tuning.operands.quantize", quantize)

    large, small = tune(bench, (3, 25, K), (3, N, K)).points

    assert large.order == ()
    assert states(large)["eager"] == "failed"
    assert small.order == ("eager",)


@pytest.mark.parametrize("when", ["checked", "timed"])
def test_a_lost_context_ends_the_tuning_and_keeps_what_was_measured(
    bench: Workbench, when: str
) -> None:
    bench.plant("swift", 10.0)
    first: list[None] = []

    def loses(out: torch.Tensor, *rest: Any) -> torch.Tensor:
        if rest[-1].n == 25:
            if when == "timed" and not first:
                first.append(None)
                return out
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return out

    bench.plant("deadly", 50.0, fault=loses)

    with pytest.raises(BackendUnavailableError, match=f"deadly lost .* while it was {when}"):
        tune(bench, (3, N, K), (3, 25, K), (3, 26, K))

    assert explained().backend == "swift"


def test_an_interruption_keeps_what_was_measured(bench: Workbench) -> None:
    swift = bench.plant("swift", 10.0)

    def interrupted(out: torch.Tensor, *rest: Any) -> torch.Tensor:
        if rest[-1].n == 25:
            raise KeyboardInterrupt
        return out

    swift.fault = interrupted

    with pytest.raises(KeyboardInterrupt):
        tune(bench, (3, N, K), (3, 25, K))

    assert explained().backend == "swift"


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


def test_a_home_that_cannot_be_written_is_said_once_and_the_process_goes_on(
    bench: Workbench,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    monkeypatch.setenv("FP8DISPATCH_CACHE_DIR", str(tmp_path / "file"))
    bench.plant("swift", 10.0)

    with caplog.at_level(logging.WARNING, logger="fp8dispatch"):
        report = tune(bench, (3, N, K), (100, N, K))
        tune(bench, (9, N, K))

    assert report.file is None
    assert explained().backend == "swift"
    assert explained(torch.zeros(100, K, dtype=torch.bfloat16)).backend == "swift"
    assert re.match(r"tuned, in this process only, \d{4}", explained().route)
    said = [one for one in caplog.messages if "for this process only" in one and "tuned" in one]
    assert len(said) == 1
    assert "FP8DISPATCH_CACHE_DIR" in said[0]
    start_anew()
    assert explained().backend == "eager"


def test_a_disk_that_is_full_leaves_what_was_there(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    swift = bench.plant("swift", 10.0)
    tune(bench)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fp8dispatch.tuning.store.write_atomically", full)
    swift.speed = lambda _: 300.0
    assert tune(bench).file is None
    assert explained().backend == "eager", "what was measured last holds in this process"
    assert explained().route.startswith("tuned, in this process only, ")

    start_anew()
    assert explained().backend == "swift"


def test_a_capture_that_is_under_way_is_refused(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    with pytest.raises(InvalidInputError, match="outside of a CUDA graph's capture"):
        tune(bench)

    assert bench.clock.timed == 0


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        (None, "tune needs the GPU cuda, torch finds 0"),
        ("cuda:3", "tune needs the GPU cuda:3, torch finds 0"),
        ("meta", "must be a CUDA device or 'cpu', found meta"),
        ("gpu", "must be a CUDA device or 'cpu', found 'gpu'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, device: str | None, sentence: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(DeviceError, match=re.escape(sentence)):
        tune(bench, device=device)


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
