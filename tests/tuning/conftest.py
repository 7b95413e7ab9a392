"""Backends whose speed a test states, a clock that they move, and a home of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8dispatch import decide, overrides, policy, registry, trust
from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.eager import Eager
from fp8dispatch.probes import device
from fp8dispatch.tuning import orders
from fp8dispatch.tuning.store import TunedStore

Speed = Callable[[int], float]


class Clock:
    """Microseconds that pass as backends say, and the timer that reads them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timed = 0

    def timer(self, call: Callable[[], object]) -> float:
        start = self.now
        call()
        self.timed += 1
        return self.now - start


class Planted(Eager):
    """Right numbers in as many microseconds as it is told to take, unless it has a fault."""

    verified_capabilities = (None,)  # type: ignore[assignment]  # of a CPU: tested in this process

    def __init__(self, name: str, clock: Clock, speed: Speed, declared: dict[str, Any]) -> None:
        self.name = name  # type: ignore[misc]  # a class variable of real backends
        self.clock, self.speed, self.fault = clock, speed, declared.pop("fault", None)
        self.calls: list[tuple[int, int, int]] = []
        for attribute, value in declared.items():
            setattr(self, attribute, value)

    def matmul(self, x: Any, weight: Any, bias: Any, problem: Any) -> torch.Tensor:
        self.calls.append((problem.m, problem.n, problem.k))
        self.clock.now += self.speed(problem.m)
        out = super().matmul(x, weight, bias, problem)
        return out if self.fault is None else self.fault(out, x, weight, problem)


class Workbench:
    """The planted backends by name, behind `eager` in the default order of a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self._patch = Clock(), monkeypatch
        self.backends: dict[str, Planted] = {}
        loaded: Any = registry.load
        eager = Planted("eager", self.clock, lambda _: 100.0, {})

        def load(name: str) -> Backend:
            return eager if name == "eager" else self.backends.get(name) or loaded(name)

        monkeypatch.setattr(registry, "load", load)
        monkeypatch.setattr(registry, "NAMES", ("eager",))

    def plant(self, name: str, us: float | Speed, **declared: Any) -> Planted:
        speed = us if callable(us) else lambda _: us
        self.backends[name] = Planted(name, self.clock, speed, declared)
        self._patch.setattr(registry, "NAMES", (*registry.NAMES, name))
        return self.backends[name]

    @property
    def timer(self) -> Callable[[Callable[[], object]], float]:
        return self.clock.timer


def start_anew() -> None:
    """What another process would know: files, and nothing else."""
    orders.forget()
    orders._unstored.clear()
    decide.forget()
    trust.forget()
    trust.release()
    policy.reload_environment()
    overrides.set_backend()


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The cache directory of the test, and no statement from outside it."""
    for variable in ("BACKEND", "ACCURACY", "BATCH_INVARIANT", "TUNED"):
        monkeypatch.delenv(f"FP8DISPATCH_{variable}", raising=False)
    monkeypatch.setenv("FP8DISPATCH_CACHE_DIR", str(tmp_path / "cache"))
    start_anew()
    yield tmp_path / "cache"
    start_anew()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Workbench:
    return Workbench(monkeypatch)


@pytest.fixture
def machine() -> Any:
    """The CPU as the router sees it."""
    return device.describe(torch.device("cpu"))


@pytest.fixture
def store(home: Path) -> TunedStore:
    return TunedStore(home)
