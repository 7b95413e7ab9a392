"""A child process turns an abort, a hang, a flood and a lie into an answer."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import pytest

from fp8dispatch.probes import isolated
from fp8dispatch.probes.isolated import IsolatedResult, run_isolated
from fp8dispatch.recipe import BLOCK_128, TENSOR

LIMIT_S = 60.0  # never waited for: it only has to be longer than a right answer takes


def isolate(name: str, timeout_s: float = LIMIT_S) -> IsolatedResult:
    return run_isolated(f"tests.probes.planted:{name}", "cpu", BLOCK_128, timeout_s)


def test_a_right_backend_is_right_whatever_it_prints_and_the_parent_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FP8DISPATCH_BACKEND", "no such backend")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    assert isolate("CHATTERS").outcome == "right"


def test_a_registered_backend_is_loaded_by_its_name() -> None:
    assert run_isolated("eager", "cpu", TENSOR, LIMIT_S).outcome == "right"


def test_an_abort_is_a_crash_with_its_last_words() -> None:
    result = isolate("ABORTS")
    assert result.outcome == "crashed"
    assert "SIGABRT" in result.reason
    assert "Arch conditional MMA" in result.reason


def test_a_segmentation_fault_is_a_crash() -> None:
    result = isolate("SEGFAULTS")
    assert result.outcome == "crashed"
    assert "SIGSEGV" in result.reason


def test_an_exit_without_an_answer_is_a_crash() -> None:
    assert isolate("EXITS") == IsolatedResult("crashed", "it ended its process with exit status 0")


def test_a_sticky_error_is_a_crash() -> None:
    result = isolate("STICKY")
    assert result.outcome == "crashed"
    assert "lost the CUDA context" in result.reason


def test_an_exception_is_wrong_and_named_in_one_line() -> None:
    result = isolate("RAISES")
    assert result.outcome == "wrong"
    assert result.reason == "it raised RuntimeError: no kernel image is available"


def test_a_lie_on_stdout_is_not_believed() -> None:
    result = isolate("LIES")
    assert result.outcome == "wrong"
    assert "0.25 instead of" in result.reason


def test_a_flood_is_stopped() -> None:
    result = isolate("FLOODS")
    assert result.outcome == "flooded"


def test_a_hang_is_ended_with_everything_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[subprocess.Popen[bytes]] = []
    kill = isolated._kill
    monkeypatch.setattr(isolated, "_kill", lambda process: (ended.append(process), kill(process)))
    monkeypatch.setattr(isolated, "BUSY_SHARE", math.inf)  # another test's question

    start = time.monotonic()
    result = isolate("HANGS", timeout_s=1)

    assert result == IsolatedResult("hung", "no result after 1 s")
    assert time.monotonic() - start < 60
    assert ended[0].returncode == -9
    with pytest.raises(ProcessLookupError):
        os.killpg(ended[0].pid, 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OUT_OF_MEMORY", "memory ran out"),
        ("REFUSES", "not applicable"),
        ("KILLED", "ended from outside with SIGKILL"),
    ],
)
def test_what_says_nothing_of_the_backend_is_untested(name: str, words: str) -> None:
    result = isolate(name)
    assert result.outcome == "untested"
    assert words in result.reason


def test_a_device_that_the_child_cannot_use_is_untested() -> None:
    result = run_isolated("eager", "cuda:99", BLOCK_128, LIMIT_S)
    assert result.outcome == "untested"
    assert "plain torch does not run in the child" in result.reason


def test_a_busy_machine_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is too short even for plain torch."""
    result = isolate("HANGS", timeout_s=1e-6)
    assert result.outcome == "untested"
    assert "is the machine busy?" in result.reason

    monkeypatch.setattr(isolated, "START_LIMIT_S", 0.0)
    result = isolate("RIGHT")
    assert result.outcome == "untested"
    assert "was not ready" in result.reason


def test_where_no_child_can_be_started_nothing_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert isolate("RIGHT").outcome == "untested"
    monkeypatch.setattr(sys, "executable", "")
    assert isolate("RIGHT").outcome == "untested"


def test_the_child_gets_no_secrets() -> None:
    parent = {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/opt/cuda/lib",
        "CUDA_VISIBLE_DEVICES": "1",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "FP8DISPATCH_BACKEND": "triton",
        "HF_TOKEN": "hf_x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "TORCH_HUB_TOKEN": "x",
        "DATABASE_URL": "x",
    }
    child = isolated._environment(parent)
    assert child["CUDA_VISIBLE_DEVICES"] == "1"
    assert child["LD_LIBRARY_PATH"] == "/opt/cuda/lib"
    assert "x" not in child.values()
    assert not {"HF_TOKEN", "FP8DISPATCH_BACKEND"} & set(child)
