"""The timing loop, and the one place that touches CUDA's events, graphs and caches.

What a figure means is the name of the method that measured it:

* `Timer.single`: one call behind a flush of L2, so its weights are cold; on the stream's clock.
  One flush takes about 60 microseconds, in which the host runs ahead: what it needs beyond that
  is part of the figure. With more flushes the figure is the device's time alone.
* `Timer.chain`: calls captured in one CUDA graph and replayed; microseconds for each call. Calls
  that walk over `copies` of the weights find them cold, calls on one weight find it warm in L2.
* `Timer.wall`: calls back to back on the host's clock, drained: what a loop in Python waits for.

On a CPU the same methods run the same calls without events, graphs or flushes, so that every suite
can be rehearsed; such figures say nothing about anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
COLD_BYTES = 300_000_000
"""Together the copies of a weight must be far larger than L2 (60 MB on an H200)."""
_FLUSH_BYTES = 256 << 20
_FLUSH_US = 60.0


class Figure(NamedTuple):
    """Microseconds of one arm.

    Attributes:
        us: median over the rounds.
        spread_us: largest minus smallest round.
    """

    us: float
    spread_us: float


class Timer:
    """Times calls on a CPU, with a clock of seconds that a test may replace."""

    device = "cpu"
    rounds = 2
    wall_calls, host_calls = 2, 2

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def synchronize(self) -> None:
        """Wait for the device."""

    def replay(self, call: Call) -> Call:
        """A call that repeats what `call` does on the device, without the host's part."""
        call()
        return call

    def single(self, call: Call, *, flushes: int = 1) -> float:
        """Median microseconds of one call that finds nothing in L2."""
        return self.wall(call, 2)

    def chain(self, calls: Sequence[Call], replays: int = 5) -> Callable[[], float]:
        """Capture calls one after the other; what is returned measures microseconds for each."""

        def everything() -> None:
            for call in calls:
                call()

        return lambda: self.wall(everything, 1) / len(calls)

    def wall(self, call: Call, calls: int = 0) -> float:
        """Microseconds of a call among calls back to back, until the device is done."""
        calls = calls or self.wall_calls
        call()
        self.synchronize()
        start = self._clock()
        for _ in range(calls):
            call()
        self.synchronize()
        return (self._clock() - start) / calls * 1e6

    def host(self, call: Call) -> float:
        """Microseconds until a call returns, among calls back to back; the device may lag."""
        self.synchronize()
        start = self._clock()
        for _ in range(self.host_calls):
            call()
        elapsed = self._clock() - start
        self.synchronize()
        return elapsed / self.host_calls * 1e6

    def peak_bytes(self, call: Call) -> int | None:
        """Most memory that a call held beyond what was held before; None where nobody counts."""
        call()
        return None


class CudaTimer(Timer):
    """Times calls on the current CUDA device."""

    device = "cuda"
    rounds = 3
    wall_calls, host_calls = 100, 20

    def __init__(self, milliseconds: float = 6.0) -> None:
        super().__init__()
        self._milliseconds = milliseconds
        self._sink = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def replay(self, call: Call) -> Call:
        call()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def single(self, call: Call, *, flushes: int = 1) -> float:
        call()
        estimate = self._timed(call, 1, flushes)[0]
        repeats = int(self._milliseconds * 1e3 / (estimate + _FLUSH_US * flushes))
        return statistics.median(self._timed(call, min(max(repeats, 5), 60), flushes))

    def _timed(self, call: Call, repeats: int, flushes: int) -> list[float]:
        def event() -> torch.cuda.Event:
            return torch.cuda.Event(enable_timing=True)

        pairs = [(event(), event()) for _ in range(repeats)]
        for start, end in pairs:
            for _ in range(flushes):
                self._sink.zero_()
            start.record()
            call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in pairs]

    def chain(self, calls: Sequence[Call], replays: int = 5) -> Callable[[], float]:
        def everything() -> None:
            for call in calls:
                call()

        replay = self.replay(everything)

        def measure() -> float:
            replay()
            times = []
            for _ in range(replays):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3)
            return statistics.median(times) / len(calls)

        return measure

    def peak_bytes(self, call: Call) -> int | None:
        call()
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


def timer_for(device: str) -> Timer:
    """The timer of a device."""
    return CudaTimer() if device == "cuda" else Timer()


def alternate(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Figure]:
    """Measure arms in turns, forwards and backwards, so that a drift of the clock hits all."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        order = list(arms.items())
        for name, measure in order if number % 2 == 0 else reversed(order):
            times[name].append(measure())
    return {name: figure(values) for name, values in times.items()}


def figure(values: Sequence[float]) -> Figure:
    """Median and spread of the rounds of one arm."""
    return Figure(statistics.median(values), max(values) - min(values))


def table(figures: Mapping[str, Figure]) -> dict[str, dict[str, float]]:
    """Figures as a result file holds them."""
    return {
        "us": {name: round(one.us, 2) for name, one in figures.items()},
        "spread_us": {name: round(one.spread_us, 2) for name, one in figures.items()},
    }


def copies_for(nbytes: int) -> int:
    """How many copies of a weight a cold chain walks over."""
    return max(2, -(-COLD_BYTES // nbytes))
