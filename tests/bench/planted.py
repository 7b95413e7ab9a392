"""Stand-ins: a clock that moves when told, and CUDA's events and graphs on a CPU."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytest


class Clock:
    """Seconds that pass only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float) -> Callable[[], None]:
        """A call of this length."""

        def call() -> None:
            self.now += seconds

        return call


def plant_cuda(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[str]:
    """Put events, graphs and counters of memory in place of CUDA's; returns what happens to them.

    A captured call is run once at capture, which takes no time of the device, and again by replay.
    """
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            log.append("event synchronize")

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at) * 1e3

    class Graph:
        def replay(self) -> None:
            clock.now += self.seconds
            log.append("replay")

    @contextmanager
    def graph(captured: Any) -> Iterator[None]:
        start = clock.now
        log.append("capture")
        yield
        captured.seconds = clock.now - start
        clock.now = start

    class Sink:
        def zero_(self) -> None:
            log.append("flush")

    planted = types.SimpleNamespace(
        Event=Event,
        CUDAGraph=Graph,
        graph=graph,
        synchronize=lambda: log.append("synchronize"),
        memory_allocated=lambda: 100,
        reset_peak_memory_stats=lambda: log.append("reset"),
        max_memory_allocated=lambda: 350,
    )
    monkeypatch.setattr(torch, "cuda", planted)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Sink())
    return log
