"""Stored orders and several processes or threads: they take turns, and one that dies frees its."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from fp8dispatch.tuning import orders
from fp8dispatch.tuning.store import TunedStore
from tests.tuning.stored import H200, order, point


def test_a_home_where_nobody_tuned_costs_no_file_and_no_pydantic() -> None:
    code = """
    import sys
    from fp8dispatch.machine import Machine
    from fp8dispatch.problem import LinearProblem
    from fp8dispatch.recipe import ROW
    from fp8dispatch.tuning import orders
    problem = LinearProblem(1, 8, 16, ROW, "float8_e4m3fn", "float8_e4m3fn", "bfloat16")
    assert orders.find(problem, Machine("cuda", "NVIDIA H200", (9, 0))) is None
    print([name for name in ("pydantic", "filelock", "torch") if name in sys.modules])
    """
    assert in_a_child(code).stdout.strip() == "[]"


def in_a_child(code: str) -> subprocess.CompletedProcess[str]:
    import textwrap

    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran


_ADDS = """
import sys
from pathlib import Path
from fp8dispatch.tuning.store import DeviceFingerprint, TunedPoint, TunedStore
home, fingerprint, point, first, wait = sys.argv[1:]
store = TunedStore(Path(home))
fingerprint = DeviceFingerprint.model_validate_json(fingerprint)
point = TunedPoint.model_validate_json(point)
for m in range(int(first), int(first) + 8):
    with store.turn(fingerprint) as refused:
        assert refused == ""
        if wait == "wait":
            print("held", flush=True)
            input()
        store.add(fingerprint, (point.model_copy(update={"m": m}),))
"""


def adding(store: TunedStore, first: int, wait: str = "") -> subprocess.Popen[str]:
    """A process that tunes eight sizes, or one that waits before it writes the first."""
    fingerprint = orders.fingerprint_of(H200).model_dump_json()
    arguments = (str(store.directory.parent), fingerprint, point().model_dump_json(), str(first))
    pipes = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", _ADDS, *arguments, wait],
        stdin=pipes,
        stdout=pipes,
        stderr=pipes,
        text=True,
    )


def test_two_processes_that_tune_keep_what_both_measured(store: TunedStore) -> None:
    children = [adding(store, first) for first in (1, 101)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors

    found, _ = store.load(orders.fingerprint_of(H200))

    assert found is not None
    assert {one.m for one in found.points} == {*range(1, 9), *range(101, 109)}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_the_turn_of_a_process_that_was_killed_is_free(store: TunedStore) -> None:
    child = adding(store, 1, "wait")
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "held"
    fingerprint = orders.fingerprint_of(H200)
    with store.turn(fingerprint, wait_s=0.05) as refused:
        assert "another process holds" in refused

    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)

    with store.turn(fingerprint, wait_s=60) as refused:
        assert refused == ""


def test_threads_take_turns_too(store: TunedStore) -> None:
    fingerprint = orders.fingerprint_of(H200)
    inside: list[int] = []
    most = 0

    def add(m: int) -> None:
        nonlocal most
        with store.turn(fingerprint) as refused:
            assert refused == ""
            inside.append(m)
            most = max(most, len(inside))
            store.add(fingerprint, (point(m=m),))
            inside.remove(m)

    threads = [threading.Thread(target=add, args=(m,)) for m in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found, _ = store.load(fingerprint)
    assert found is not None
    assert {one.m for one in found.points} == set(range(1, 9))
    assert most == 1


def test_without_the_turn_nothing_is_written(store: TunedStore) -> None:
    assert orders.keep(H200, point(), store, "another process holds it") is None

    assert not list(store.directory.glob("*.json"))
    assert order() == ("gluon", "cublaslt"), "it holds in this process"
