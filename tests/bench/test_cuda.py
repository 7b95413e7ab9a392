"""The timer on a GPU: graphs repeat what they captured, and memory is counted."""

from __future__ import annotations

import pytest
import torch

from bench.ceilings import read_bytes
from bench.environment import Gauge
from bench.timing import CudaTimer

pytestmark = pytest.mark.gpu


def test_replay_and_chain_repeat_every_call() -> None:
    counters = torch.zeros(2, device="cuda")
    timer = CudaTimer()

    replay = timer.replay(lambda: counters[0].add_(1))
    counters.zero_()
    replay()
    replay()
    assert counters[0].item() == 2

    measure = timer.chain([lambda: counters[0].add_(1), lambda: counters[1].add_(1)], replays=3)
    counters.zero_()
    assert measure() > 0
    assert counters.tolist() == [4, 4]


def test_peak_bytes_see_what_is_freed_again() -> None:
    peak = CudaTimer().peak_bytes(lambda: torch.empty(1 << 24, dtype=torch.uint8, device="cuda"))

    assert peak is not None and peak >= 1 << 24


def test_the_reading_kernel_takes_stacks_and_ids() -> None:
    data = torch.randint(0, 255, (5, 64, 256), dtype=torch.uint8, device="cuda")

    assert read_bytes(data).item() == 0
    assert read_bytes(data, torch.tensor([4, 0], device="cuda")).item() == 0


def test_the_gauge_answers() -> None:
    found = Gauge("cuda").read()

    assert found is not None and found["sm_mhz"]
