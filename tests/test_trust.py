"""Verdicts: looked up before they are found out, found out where it is safe; and the quarantine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fp8dispatch import failures, policy, registry, trust
from fp8dispatch.machine import Machine
from fp8dispatch.probes import isolated
from fp8dispatch.probes.isolated import IsolatedResult
from fp8dispatch.recipe import BLOCK_128, ROW
from fp8dispatch.trust import Verdict
from tests.probes import planted
from tests.probes.planted import Planted

CPU = torch.device("cpu")
VERIFIED = ((9, 0),)
# The tensors are on the CPU; what is verified is a question to the description alone.
HOPPER = Machine("cpu", "stands for an H100", (9, 0), {"torch": "2.11.0"})


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No verdicts, no quarantine, and a cache directory of the test's own."""
    monkeypatch.setenv("FP8DISPATCH_CACHE_DIR", str(tmp_path / "cache"))
    trust.forget()
    trust.release()
    yield
    trust.forget()
    trust.release()


def verified(fault: planted.Fault | None = None) -> Planted:
    return Planted(fault, verified_capabilities=VERIFIED)


def judge(backend: Planted, *, may_probe: bool = True, machine: Machine = HOPPER) -> Verdict:
    return trust.judge("planted", backend, CPU, machine, BLOCK_128, may_probe=may_probe)


def test_plain_torch_needs_no_canary() -> None:
    verdict = trust.judge("eager", registry.load("eager"), CPU, HOPPER, ROW, may_probe=False)
    assert verdict.state == "not needed"


def test_a_right_backend_is_tested_once_and_remembered_on_disk() -> None:
    backend = verified()
    first = judge(backend)
    assert (first.state, first.source) == ("right", "in this process")
    calls = backend.calls
    assert calls > 0

    assert judge(backend) is first
    trust.forget()  # as in the next process
    again = judge(backend)
    assert (again.state, again.source, again.reason) == ("right", "disk", first.reason)
    assert backend.calls == calls


def test_a_wrong_backend_is_said_once_and_remembered(caplog: pytest.LogCaptureFixture) -> None:
    backend = verified(planted.rounded_up_scale)
    with caplog.at_level(logging.WARNING, "fp8dispatch"):
        assert judge(backend).state == "wrong"
        assert judge(backend).state == "wrong"
    assert len(caplog.records) == 1
    assert "times the bound" in caplog.text
    trust.forget()
    assert judge(backend).source == "disk"

    assert trust.clear_stored() == 1
    assert judge(backend).source == "in this process"


def test_what_raises_is_wrong() -> None:
    verdict = judge(verified(planted.raises))
    assert verdict.state == "wrong"
    assert verdict.reason == "it raised RuntimeError: no kernel image is available"


def test_other_versions_ask_again() -> None:
    backend = verified()
    judge(backend)
    calls = backend.calls
    trust.forget()
    newer = Machine("cpu", HOPPER.device_name, (9, 0), {"torch": "2.12.0"})
    assert judge(backend, machine=newer).source == "in this process"
    assert backend.calls > calls


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("cublaslt", "nvidia-cublas"),
        ("cublaslt", "nvidia-cublas-cu12"),
        ("deepgemm", "sgl-deep-gemm"),
        ("fbgemm", "fbgemm-gpu-genai"),
        ("fbgemm", "fbgemm-gpu-nightly-genai"),
        ("fbgemm_tile", "fbgemm-gpu-genai"),
        ("mslk", "mslk-cuda"),
        ("mslk_tile", "mslk-cuda"),
        ("torchao", "torchao"),
        ("torchao", "torchao-nightly"),
    ],
)
def test_a_stored_verdict_does_not_outlive_its_library(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own release, with all else the same, asks again."""

    def judged(version: str) -> Verdict:
        trust.forget()  # as in the next process
        versions = {"torch": "2.11.0", library: version, "transformers": version}
        machine = Machine("cpu", HOPPER.device_name, (8, 0), versions)
        return trust.judge(name, registry.load(name), CPU, machine, BLOCK_128, may_probe=True)

    results = iter(["right", "wrong"])
    monkeypatch.setattr(
        isolated, "run_isolated", lambda *_: IsolatedResult(next(results), "as the test says")
    )
    assert judged("1.4.0").state == "right"
    assert judged("1.4.0").source == "disk"
    newer = judged("1.5.0")
    assert (newer.state, newer.source) == ("wrong", "in a child process")


@pytest.mark.parametrize("name", ["deepgemm", "experts.deepgemm"])
def test_a_stored_verdict_does_not_outlive_its_compiler(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another nvcc makes other machine code of the same library."""
    compiler = tmp_path / "toolkit" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    monkeypatch.delenv("DG_JIT_NVCC_COMPILER", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(compiler.parent.parent))
    monkeypatch.setattr(isolated, "run_isolated", lambda *_: IsolatedResult("right", "said so"))
    machine = Machine("cpu", HOPPER.device_name, (8, 0), {"torch": "2.11.0"})

    def source() -> str:
        trust.forget()  # as in the next process
        found = trust.judge(name, registry.find(name), CPU, machine, BLOCK_128, may_probe=True)
        return found.source

    assert source() == "in a child process"  # no compiler: the library will refuse to load
    compiler.write_bytes(b"release 13.0")
    assert source() == "in a child process"
    assert source() == "disk"
    compiler.write_bytes(b"release 13.0.1")
    assert source() == "in a child process"
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(tmp_path / "another"))
    assert source() == "in a child process"


def test_a_stored_verdict_does_not_outlive_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = verified()
    monkeypatch.setattr(registry, "plugin_version", {"planted": "1.0"}.get)
    judge(backend)
    trust.forget()
    assert judge(backend).source == "disk"
    trust.forget()
    monkeypatch.setattr(registry, "plugin_version", {"planted": "1.1"}.get)
    assert judge(backend).source == "in this process"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (planted.runs_out_of_memory, "memory ran out"),
        (planted.warns, "a warning was made an error"),
    ],
)
def test_what_could_not_be_tested_is_not_stored_and_tested_again_later(
    fault: planted.Fault, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = verified(fault)
    verdict = judge(backend)
    assert verdict.state == "untested"
    assert words in verdict.reason
    assert not list(tmp_path.rglob("*.json"))
    calls = backend.calls
    assert judge(backend) == verdict
    assert backend.calls == calls, "not at once"

    monkeypatch.setattr(trust, "RETRY_S", 0.0)
    backend.fault = None
    assert judge(backend).state == "right"


def test_while_capturing_only_what_is_known_is_told() -> None:
    backend = verified()
    assert judge(backend, may_probe=False).state == "untested"
    assert backend.calls == 0
    judge(backend)
    assert judge(backend, may_probe=False).state == "right"
    trust.forget()
    assert judge(backend, may_probe=False).source == "disk"


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        ("right", "right"),
        ("wrong", "wrong"),
        ("crashed", "wrong"),
        ("hung", "wrong"),
        ("flooded", "wrong"),
        ("untested", "untested"),
    ],
)
def test_native_code_that_is_not_verified_here_runs_in_a_child_first(
    outcome: isolated.Outcome,
    state: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked = []

    def answer(*question: object) -> IsolatedResult:
        asked.append(question)
        return IsolatedResult(outcome, "so it was")

    monkeypatch.setattr(isolated, "run_isolated", answer)
    backend = Planted()  # verified nowhere
    assert judge(backend) == Verdict(state, "so it was", "in a child process")  # type: ignore[arg-type]
    assert asked == [("planted", "cpu", BLOCK_128, trust.PROBE_LIMIT_S)]
    assert backend.calls == 0
    assert len(list(tmp_path.rglob("*.json"))) == (state != "untested")


def test_an_abort_is_a_verdict_and_not_the_end() -> None:
    name = "tests.probes.planted:ABORTS"
    verdict = trust.judge(name, planted.ABORTS, CPU, HOPPER, BLOCK_128, may_probe=True)
    assert verdict.state == "wrong"
    assert "SIGABRT" in verdict.reason
    trust.forget()
    assert trust.judge(name, planted.ABORTS, CPU, HOPPER, BLOCK_128, may_probe=False) == Verdict(
        "wrong", verdict.reason, "disk"
    )


def test_threads_test_a_backend_once() -> None:
    together = threading.Barrier(4)
    backend = verified()
    verdicts: list[Verdict] = []

    def ask() -> None:
        together.wait()
        verdicts.append(judge(backend))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verdicts) == 4
    assert len({id(verdict) for verdict in verdicts}) == 1


_RACE = """
import sys, torch
from fp8dispatch import trust
from tests import test_trust
from tests.test_trust import CPU, judge, verified
sys.stdin.readline()  # both have imported everything
print(judge(verified()).source, flush=True)
"""


def test_two_processes_that_race_on_an_empty_cache_are_both_right(tmp_path: Path) -> None:
    cache = tmp_path / "shared"
    environment = {
        **os.environ,
        "FP8DISPATCH_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    sources = sorted(racer.communicate(timeout=120)[0].strip() for racer in racers)

    assert [racer.returncode for racer in racers] == [0, 0]
    assert sources == ["disk", "in this process"]
    assert len(list(cache.rglob("*.json"))) == 1


def test_a_process_that_waits_in_vain_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "WAIT_LIMIT_S", 0.0)
    backend = verified()
    store = trust._store()
    assert store is not None
    with store.probing(trust._fingerprint("planted", backend, HOPPER, BLOCK_128), wait_s=0):
        verdict = judge(backend)
    assert verdict.state == "untested"
    assert "another process" in verdict.reason
    assert backend.calls == 0


def test_without_a_home_verdicts_stay_in_memory_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(policy, "cache_directory", homeless)
    backend = verified()
    with caplog.at_level(logging.WARNING, "fp8dispatch"):
        assert judge(backend).state == "right"
        calls = backend.calls
        assert judge(backend).state == "right"
        assert trust.clear_stored() == 0
    assert backend.calls == calls
    assert "for this process only" in caplog.text


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_next_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP8DISPATCH_CACHE_DIR", str(tmp_path / "file"))
    backend = verified()
    assert judge(backend).state == "right"
    calls = backend.calls
    assert judge(backend).state == "right"
    assert backend.calls == calls


def test_quarantine_holds_for_one_backend_device_and_recipe() -> None:
    trust.quarantine("mslk", CPU, ROW, ValueError("first\nsecond"))
    trust.quarantine("mslk", CPU, ROW, "later")
    assert trust.quarantined("mslk", CPU, ROW) == "ValueError: first"
    assert trust.quarantined("mslk", CPU, BLOCK_128) is None
    assert trust.quarantined("fbgemm", CPU, ROW) is None
    assert trust.quarantined("mslk", torch.device("cuda", 0), ROW) is None
    assert trust.quarantines() == {("mslk", "cpu", ROW): "ValueError: first"}

    trust.quarantine("fbgemm", CPU, ROW, "failed")
    assert trust.release("mslk") == 1
    assert trust.quarantined("mslk", CPU, ROW) is None
    assert trust.release() == 1
    assert trust.quarantines() == {}


def test_out_of_memory_never_quarantines() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trust.quarantine("mslk", CPU, ROW, error)
    assert raised.value is error
    assert trust.quarantines() == {}


def caused(error: Exception) -> Exception:
    wrapped = RuntimeError("the kernel failed")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    ("error", "memory", "sticky"),
    [
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), True, False),
        (MemoryError(), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True, False),
        (caused(torch.OutOfMemoryError("CUDA out of memory")), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was met"), False, True),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("CUDA error: unspecified launch failure"), False, True),
        (RuntimeError("CUDA error: misaligned address"), False, True),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasLtMatmul"), False, True),
        (caused(RuntimeError("CUDA error: an illegal memory access")), False, True),
        (RuntimeError("CUDA error: no kernel image is available"), False, False),
        (RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"), False, False),
        (RuntimeError("CUDA error: invalid configuration argument"), False, False),
        (ValueError("weights out of memory order"), False, False),
        (NotImplementedError(), False, False),
    ],
    ids=str,
)
def test_errors_are_classified(error: Exception, memory: bool, sticky: bool) -> None:
    assert failures.is_out_of_memory(error) is memory
    assert failures.is_sticky_cuda_error(error) is sticky


def test_a_lost_context_is_a_wrong_verdict_that_says_so() -> None:
    verdict = judge(verified(planted.loses_the_context))
    assert verdict.state == "wrong"
    assert "lost the CUDA context" in verdict.reason


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_another_thread_tests_does_not_hang() -> None:
    key = ("planted", "cpu", BLOCK_128)
    with trust._guard, trust._probing[key]:
        child = os.fork()
        if child == 0:
            free = trust._guard.acquire(blocking=False) and not trust._probing
            os._exit(0 if free else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0
