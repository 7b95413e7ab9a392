"""Arms take turns, and a difference within the noise is none."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.tuning.timing import (
    SMALLEST_BAND,
    DeviceTimer,
    Timing,
    default_timer,
    rank,
    time_arms,
    wall_clock,
)

ORDER = ("a", "b", "c", "d", "e")
timings = st.dictionaries(
    st.sampled_from(ORDER),
    st.builds(Timing, st.floats(1, 1e4), st.floats(0, 0.5)),
    min_size=1,
)


class Recorder:
    """Gives what it is told to give, arm by arm, and notes who was timed when."""

    def __init__(self, samples: dict[str, list[float]]) -> None:
        self.samples = {name: iter(values) for name, values in samples.items()}
        self.seen: list[str] = []
        self.arms = {name: self._arm(name) for name in samples}

    def _arm(self, name: str) -> object:
        def call() -> str:
            return name

        return call

    def timer(self, call: object) -> float:
        name = call()  # type: ignore[operator]
        self.seen.append(name)
        return next(self.samples[name])


def test_arms_take_turns_and_the_median_counts() -> None:
    told = Recorder({"a": [9.0, 5.0, 1.0, 6.0, 7.0], "b": [4.0, 4.0, 4.0, 4.0, 400.0]})

    timed, failed = time_arms(told.arms, told.timer, rounds=5)  # type: ignore[arg-type]

    assert told.seen == ["a", "b"] * 5
    assert timed["a"] == Timing(6.0, (7.0 - 5.0) / 6.0)
    assert timed["b"] == Timing(4.0, 0.0), "one bad round is neither the time nor the spread"
    assert failed == {}


def test_a_hopeless_arm_is_timed_in_the_first_rounds_only() -> None:
    told = Recorder({"a": [10.0] * 7, "b": [21.0, 90.0], "c": [19.0] * 7})

    timed, _ = time_arms(told.arms, told.timer)  # type: ignore[arg-type]

    assert told.seen == ["a", "b", "c"] * 2 + ["a", "c"] * 5
    assert timed["b"].us == 55.5


def test_an_arm_that_raises_leaves_and_one_that_loses_the_context_ends_it() -> None:
    def call(error: Exception | None) -> object:
        def run() -> None:
            if error is not None:
                raise error

        return run

    def timer(run: object) -> float:
        run()  # type: ignore[operator]
        return 1.0

    plain = RuntimeError("no kernel image")
    timed, failed = time_arms({"a": call(None), "b": call(plain)}, timer)  # type: ignore[dict-item]
    assert (set(timed), failed) == ({"a"}, {"b": plain})

    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(BackendUnavailableError, match="b lost the CUDA context while it was timed"):
        time_arms({"a": call(None), "b": call(lost)}, timer)  # type: ignore[dict-item]


@given(timings)
def test_rank_names_each_arm_once_and_starts_within_the_band(found: dict[str, Timing]) -> None:
    ranked = rank(found, ORDER)

    assert sorted(ranked) == sorted(found)
    first, best = found[ranked[0]], min(found.values(), key=lambda one: one.us)
    band = max(SMALLEST_BAND, first.spread, best.spread)
    assert first.us <= best.us * (1 + band)
    for earlier in ORDER[: ORDER.index(ranked[0])]:
        if earlier in found:  # it would have come first, had it tied
            other = found[earlier]
            assert other.us > best.us * (1 + max(SMALLEST_BAND, other.spread, best.spread))


@given(timings, st.permutations(ORDER))
def test_far_apart_the_order_is_that_of_speed(found: dict[str, Timing], order: list[str]) -> None:
    apart = {
        name: Timing(2.0 ** (3 * place), 0.0)
        for place, name in enumerate(sorted(found, key=lambda name: found[name].us))
    }

    assert list(rank(apart, order)) == sorted(apart, key=lambda name: apart[name].us)


@pytest.mark.parametrize(
    ("slower", "spread", "first"),
    [(1.029, 0.0, "a"), (1.031, 0.0, "b"), (1.09, 0.1, "a"), (1.11, 0.1, "b")],
)
def test_the_band_is_three_percent_or_the_spread(slower: float, spread: float, first: str) -> None:
    found = {"a": Timing(100 * slower, 0.0), "b": Timing(100.0, spread)}

    assert rank(found, ORDER)[0] == first


class _Event:
    """An event of a device whose clock the test moves."""

    def __init__(self, log: list[object], clock: dict[str, float]) -> None:
        self._log, self._clock, self.at = log, clock, 0.0

    def record(self) -> None:
        self._log.append("event")
        self.at = self._clock["device"]

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) / 1e3  # milliseconds, as CUDA's


@pytest.mark.parametrize(("device_us", "host_us"), [(50.0, 20.0), (5.0, 20.0)])
def test_a_call_on_a_gpu_takes_what_the_slower_of_device_and_host_takes(
    monkeypatch: pytest.MonkeyPatch, device_us: float, host_us: float
) -> None:
    log: list[object] = []
    clock = {"device": 0.0, "host": 0.0}
    properties = SimpleNamespace(L2_cache_size=4096)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: _Event(log, clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr("fp8dispatch.tuning.timing.time.perf_counter", lambda: clock["host"] / 1e6)
    timer = DeviceTimer(torch.device("cpu"))

    class Flushed:
        def zero_(self) -> None:
            log.append("flush")
            clock["device"] += 1000.0
            clock["host"] += 3.0

    assert timer._flush.numel() >= 2 * 4096
    timer._flush = Flushed()  # type: ignore[assignment]

    def call() -> None:
        log.append("call")
        clock["device"] += device_us
        clock["host"] += host_us

    assert timer(call) == pytest.approx(max(device_us, host_us))
    turns = len(log) // 4
    assert log == ["flush", "event", "call", "event"] * turns + ["wait"]
    assert turns >= 5


def test_the_cpu_is_timed_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1e-6, 5e-6, 9e-6, 10e-6, 12e-6])
    monkeypatch.setattr("fp8dispatch.tuning.timing.time.perf_counter", lambda: next(now))

    assert wall_clock(lambda: None) == pytest.approx(2.0)
    assert default_timer(torch.device("cpu")) is wall_clock


def test_nothing_to_rank() -> None:
    assert rank({}, ORDER) == ()
    assert time_arms({}, wall_clock) == ({}, {})
