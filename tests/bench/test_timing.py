"""The timing loop with a clock that moves when told, and CUDA's part with planted events."""

from __future__ import annotations

import pytest

from bench import timing
from bench.timing import CudaTimer, Timer, alternate, copies_for, figure, table
from tests.bench.planted import Clock, plant_cuda


def test_wall_is_the_mean_of_calls_back_to_back_without_the_first() -> None:
    clock = Clock()
    lengths = iter([9.0, 1.0, 3.0])

    def call() -> None:
        clock.now += next(lengths)

    assert Timer(clock).wall(call, 2) == 2e6


def test_a_chain_gives_the_time_of_one_of_its_calls() -> None:
    clock = Clock()
    measure = Timer(clock).chain([clock.taking(1.0), clock.taking(3.0)])

    assert measure() == 2e6


def test_arms_take_turns_forwards_and_backwards() -> None:
    order: list[str] = []

    def arm(name: str) -> float:
        order.append(name)
        return float(len(order))

    figures = alternate({"a": lambda: arm("a"), "b": lambda: arm("b")}, rounds=3)

    assert order == ["a", "b", "b", "a", "a", "b"]
    assert figures["a"] == (4.0, 4.0)  # 1, 4, 5
    assert figures["b"] == (3.0, 4.0)  # 2, 3, 6


def test_a_figure_is_a_median_with_the_whole_spread() -> None:
    assert figure([5.0, 1.0, 2.0, 100.0]) == (3.5, 99.0)
    assert table({"a": figure([1.234, 1.238, 2.0])}) == {
        "us": {"a": 1.24},
        "spread_us": {"a": 0.77},
    }


@pytest.mark.parametrize(
    ("nbytes", "copies"), [(14_680_064, 21), (469_762_048, 2), (1000, 300_000)]
)
def test_cold_copies_together_exceed_l2_and_are_never_one(nbytes: int, copies: int) -> None:
    assert copies_for(nbytes) == copies
    assert copies * nbytes >= timing.COLD_BYTES


def test_single_flushes_before_each_call_and_takes_the_median_of_the_call_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    log = plant_cuda(monkeypatch, clock)
    timer = CudaTimer(milliseconds=6.0)

    assert timer.single(clock.taking(940e-6)) == pytest.approx(940)
    # 6 ms hold six calls of a millisecond with their flush, after the one that was estimated.
    assert log.count("flush") == 1 + 6


def test_single_repeats_a_long_call_five_times_and_a_short_one_sixty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    log = plant_cuda(monkeypatch, clock)
    timer = CudaTimer()

    timer.single(clock.taking(1.0))
    assert log.count("flush") == 1 + 5
    log.clear()
    timer.single(clock.taking(1e-6), flushes=1)
    assert log.count("flush") == 1 + 60
    log.clear()
    timer.single(clock.taking(1.0), flushes=10)
    assert log.count("flush") == 10 * (1 + 5)


def test_a_chain_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    log = plant_cuda(monkeypatch, clock)
    calls = [clock.taking(1e-3), clock.taking(3e-3)]
    measure = CudaTimer().chain(calls, replays=3)

    assert log.count("capture") == 1
    assert measure() == pytest.approx(2000)  # microseconds for each of the calls
    assert log.count("replay") == 1 + 3  # one for warmth


def test_replay_runs_a_call_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    log = plant_cuda(monkeypatch, Clock())

    CudaTimer().replay(lambda: log.append("call"))

    assert log == ["call", "synchronize", "capture", "call"]


def test_peak_bytes_are_those_beyond_what_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    log = plant_cuda(monkeypatch, Clock())

    assert CudaTimer().peak_bytes(lambda: log.append("call")) == 250
    assert log == ["call", "synchronize", "reset", "call", "synchronize"]
