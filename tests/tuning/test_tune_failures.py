"""What goes wrong while tuning: refusals, exceptions, memory, interruptions, disks, devices."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch.errors import BackendUnavailableError, DeviceError, InvalidInputError
from tests.tuning.cases import K, N, explained, states, tune
from tests.tuning.conftest import Workbench, start_anew


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
