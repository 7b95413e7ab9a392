"""The timing of kinds of kernels, with planted kernels and a planted GPU."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import hopper
from bench.arms import Linear
from bench.session import Session
from bench.timing import Timer

M, N, K = 130, 256, 256


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(hopper, "PEERS", ("eager",))
    for name in ("SAFETY_GEMM", "SAFETY_DECODE"):
        monkeypatch.setattr(hopper, name, ((M, N, K) if "GEMM" in name else (16, N, K),))
    return Session(Timer(), rounds=1)


def plant(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, Any], torch.Tensor]
) -> None:
    """Kernels that give the right numbers, changed by the configuration."""

    def kind_arm(operands: Linear, config: Any, copy: int = 0) -> Callable[[], torch.Tensor]:
        return lambda: change(operands.alone("eager", copy)(), config)

    monkeypatch.setattr(hopper, "kind_arm", kind_arm)


def test_kinds_and_peers_are_timed_by_name(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda out, _: out)

    row = hopper.gemm(session, ["wide", "split"], M, N, K)
    assert set(row["us"]) == {"eager", "wide", "split"}  # "square" was not safe
    assert row["ours"] in hopper.SAFETY
    row = hopper.decode(session, ["decode"], 16, N, K)
    assert set(row["us"]) == {"eager", "decode"}
    assert "wrong" not in row


def test_a_kind_that_is_wrong_is_named_and_not_timed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda out, config: out / 2 if config.kind == "square" else out)

    row = hopper.gemm(session, ["wide", "square"], M, N, K)

    assert set(row["us"]) == {"eager", "wide"}
    assert set(row["wrong"]) == {"square"}


def test_a_child_answers_for_its_kind(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda out, _: out)
    assert hopper.answer("wide", "cpu") == "right"
    assert hopper.answer("decode", "cpu") == "right"
    assert hopper.answer("decode_tall", "cpu") == "no shape for it"
    monkeypatch.setattr(hopper, "GEMM_ROWS", (M,))
    monkeypatch.setattr(hopper, "DECODE_ROWS", (16,))
    assert hopper.answer(f"warm:{N}x{K}", "cpu") == "right"

    plant(monkeypatch, lambda out, _: out * 2)
    assert "times the per-element bound" in hopper.answer("wide", "cpu")

    calls = iter(range(1000))
    plant(monkeypatch, lambda out, _: out + (0.001 if next(calls) % 2 else 0) * out.sign())
    assert "does not repeat bit for bit" in hopper.answer("wide", "cpu")


def test_safety_keeps_what_is_right_and_names_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Child:
        returncode = 0

        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command[-1])
            self.kind = command[-1]

        def communicate(self, timeout: float | None = None) -> tuple[str, str]:
            told = "no shape for it" if self.kind == "split4" else "right"
            return f'{{"told": "{told}"}}', ""

    monkeypatch.setattr(hopper.subprocess, "Popen", Child)
    safe: list[str] = []

    row = hopper.safety(safe, warm=True)

    assert set(safe) == set(hopper.SAFETY) - {"split4"}
    assert "wrong" not in row  # a kind that fits none of the shapes is not at fault
    assert "warm:57344x8192" in started
    started.clear()
    hopper.safety([], warm=False)
    assert tuple(started) == hopper.SAFETY


def test_the_kernel_that_reads_sees_every_word_of_the_rows_that_it_is_given(device: str) -> None:
    from bench.reading import read

    words = torch.zeros(3, 20_000, dtype=torch.int32, device=device)
    words[1, 19_999] = 1_234_567  # the sum that the kernel stores, so that its loads stay
    out = torch.zeros(1, dtype=torch.int32, device=device)

    read(words, torch.tensor([0, 2], device=device), out)
    assert out.item() == 0
    read(words, torch.tensor([2, 1], device=device), out)
    assert out.item() == 1_234_567
