"""Runs the points of a suite one by one, and keeps what they gave whatever happens next.

A suite is a module with `points(session)`: pairs of a label and a function that measures one row.
The result file is rewritten, whole, before each point, and names the point that is running: a hang
ends the process with a traceback (`faulthandler`) and leaves all rows before it. A point that
raises becomes a row that says so; only an error that has cost the CUDA context ends the suite.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import environment
from bench.timing import Timer, timer_for
from fp8dispatch.failures import is_out_of_memory, is_sticky_cuda_error

Row = dict[str, Any]
Point = tuple[str, Callable[[], Row]]


@dataclass
class Session:
    """What the suites of one run share.

    Attributes:
        timer: how calls are timed, and on which device.
        grid: which shapes; see `bench.shapes.points`.
        recipes: names of `bench.arms.RECIPES`.
        backends: only these; None for all that the registry has.
        parts: of the suite; empty for all.
        rounds: how often each arm is measured; the default is the timer's.
    """

    timer: Timer
    grid: str = "all"
    recipes: tuple[str, ...] = ("block", "row")
    backends: tuple[str, ...] | None = None
    parts: tuple[str, ...] = ()
    rounds: int = 0

    def __post_init__(self) -> None:
        self.rounds = self.rounds or self.timer.rounds
        if self.rehearsal:
            self.grid = "tiny"

    @property
    def device(self) -> str:
        return self.timer.device

    @property
    def rehearsal(self) -> bool:
        """On a CPU everything is tiny: the code runs, the figures mean nothing."""
        return self.device == "cpu"

    def takes(self, part: str) -> bool:
        """This part of the suite was asked for."""
        return not self.parts or part in self.parts


@dataclass
class Budget:
    """Seconds that a suite may take; what is running is finished, nothing new is begun."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def used(self) -> float:
        return self.clock() - self.start

    @property
    def spent(self) -> bool:
        return self.used >= self.seconds


def make_session(device: str | None = None, **options: Any) -> Session:
    """A session on a device; None takes the GPU where there is one."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    return Session(timer_for(chosen), **options)


def run(
    name: str,
    points: Iterable[Point],
    path: str,
    session: Session,
    budget: Budget,
    *,
    summary: Callable[[list[Row]], dict[str, Any]] | None = None,
    hang_seconds: float = 240.0,
) -> int:
    """Measure points until they or the budget are at an end, and write the result.

    Args:
        name: of the suite, and of the list of rows in the result.
        path: the result file.
        summary: more entries of the result, from all rows.
        hang_seconds: what one point may take before the process ends itself.

    Returns:
        0, or 1 where an arm was wrong, a point failed or the budget did not suffice.
    """
    gauge = environment.Gauge(session.device)
    rows: list[Row] = []
    result: dict[str, Any] = {
        "machine": environment.describe(),
        "suite": name,
        "rehearsal": session.rehearsal,
        "gpu before": gauge.read(),
        name: rows,
    }
    for label, measure in points:
        if budget.spent:
            result["stopped"] = f"the budget of {budget.seconds:g} s was spent before {label}"
            break
        so_far = {} if summary is None else summary(rows)
        environment.save(path, {**result, **so_far, "running": label})
        faulthandler.dump_traceback_later(hang_seconds, exit=True, file=sys.__stderr__ or 2)
        try:
            row = measure()
        except Exception as error:  # noqa: BLE001  # one point's failure is its result
            row = {"label": label, "failed": _one_line(error)}
            if is_sticky_cuda_error(error):
                result["stopped"] = f"the CUDA context was lost at {label}"
            elif is_out_of_memory(error):
                torch.cuda.empty_cache()
        finally:
            faulthandler.cancel_dump_traceback_later()
        if "stopped" not in result and (now := gauge.read()) is not None:
            row["gpu"] = now
        rows.append(row)
        print(f"{budget.used:6.1f} s  {label}  {_text(row)}", flush=True)
        if "stopped" in result:
            break
    result["gpu after"] = gauge.read()
    result["seconds"] = round(budget.used, 1)
    if summary is not None:
        result |= summary(rows)
    environment.save(path, result)
    bad = [row for row in rows if "failed" in row or row.get("wrong")]
    for row in bad:
        print(f"NOT RIGHT: {row.get('label', _key(row))}: {row.get('failed') or row['wrong']}")
    if "stopped" in result:
        print(f"STOPPED: {result['stopped']}")
    print(f"wrote {path}: {len(rows)} rows, {len(bad)} of them not right")
    return 1 if bad or "stopped" in result else 0


def _one_line(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()
    return f"{type(error).__name__}: {text[0][:300]}"


def _key(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("recipe", "m", "n", "k") if name in row)


def _text(row: Row) -> str:
    """The figures of a row on a line of a log."""
    if "failed" in row:
        return str(row["failed"])
    shown = []
    for key, value in row.items():
        if isinstance(value, dict) and "us" in value:
            value = value["us"]
        elif key not in ("us", "seconds", "bytes", "found", "sqnr_db"):
            continue
        shown.append(f"{key}: " + " ".join(f"{name} {one}" for name, one in _flat(value)))
    return " | ".join(shown)


def _flat(value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [("", value)]
    pairs: list[tuple[str, Any]] = []
    for name, one in value.items():
        inner = _flat(one) if isinstance(one, dict) else [("", one)]
        pairs += [(f"{name} {key}".strip(), last) for key, last in inner]
    return pairs
