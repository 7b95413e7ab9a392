"""Scratch memory: who shares it with whom, over a stand-in for CUDA's streams."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch import workspace as module
from fp8dispatch.workspace import _carve, quantized_activations, takes_turns, workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu", 0)


class Stream:
    """The current stream, and whether it is captured."""

    handle = 7
    captured = False


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    current = Stream()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current.captured)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: current.handle, raising=False
    )
    monkeypatch.setattr(module, "outside_of_pools", lambda device, build: build())
    monkeypatch.setattr(module, "_kept", {})
    monkeypatch.setattr(module, "_supplies", {})
    monkeypatch.setattr(module, "_threads", module._Threads())
    yield current


@given(m=st.integers(1, 70), blocks=st.integers(1, 70), groups=st.integers(1, 9))
def test_data_and_scales_are_aligned_and_apart(m: int, blocks: int, groups: int) -> None:
    k = 16 * blocks
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    data, scale = _carve(memory, m, k, groups)

    assert data.shape == (m, k) and data.is_contiguous()
    assert scale.shape == (m, groups)
    assert data.data_ptr() % 16 == scale.data_ptr() % 16 == 0
    assert scale.stride(0) == 1 and scale.stride(1) % 4 == 0
    data.view(torch.uint8).fill_(0xFF)
    assert not scale.view(torch.int32).any()


def test_calls_of_a_thread_on_one_stream_take_turns(stream: Stream) -> None:
    first, _ = quantized_activations(CPU, 16, 512, 4)
    second, _ = quantized_activations(CPU, 3, 1024, 8)
    assert first.data_ptr() == second.data_ptr()

    stream.handle = 8
    assert quantized_activations(CPU, 16, 512, 4)[0].data_ptr() != first.data_ptr()


def test_another_thread_on_the_same_stream_has_memory_of_its_own(stream: Stream) -> None:
    here, _ = quantized_activations(CPU, 16, 512, 4)
    found: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: found.append(quantized_activations(CPU, 16, 512, 4)[0])
    )
    thread.start()
    thread.join()
    assert found[0].data_ptr() != here.data_ptr()


def test_large_and_captured_calls_get_memory_of_their_own(stream: Stream) -> None:
    kept, _ = quantized_activations(CPU, 16, 512, 4)
    assert takes_turns(16, 512, 4)
    assert not takes_turns(4096, 4096, 32)
    large = [quantized_activations(CPU, 4096, 4096, 32)[0] for _ in range(2)]
    assert large[0].data_ptr() != large[1].data_ptr()

    stream.captured = True
    assert not takes_turns(16, 512, 4)
    assert quantized_activations(CPU, 16, 512, 4)[0].data_ptr() != kept.data_ptr()


def test_a_workspace_belongs_to_its_stream_and_grows(stream: Stream) -> None:
    small = workspace(CPU, 100, 4)
    assert workspace(CPU, 50, 2)[0] is small[0]
    assert not small[1].any()

    grown = workspace(CPU, 200, 2)
    assert grown[0].numel() >= 200 and grown[1].numel() >= 4
    assert workspace(CPU, 100, 4)[0] is grown[0]

    stream.handle = 8
    other = workspace(CPU, 100, 4)
    assert other[0].data_ptr() != grown[0].data_ptr()


def test_every_captured_launch_has_counters_of_its_own(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SUPPLY", 16)
    eager = workspace(CPU, 100, 6)
    stream.captured = True
    taken = [workspace(CPU, 100, 6) for _ in range(4)]  # two from the supply, then their own

    everything = [eager, *taken]
    for place in (0, 1):
        assert len({pair[place].data_ptr() for pair in everything}) == len(everything)
    first, second = (pair[1] for pair in taken[:2])
    assert second.data_ptr() - first.data_ptr() == 32  # whole multiples of 16 bytes, not shared
    assert not any(pair[1].any() for pair in taken)
