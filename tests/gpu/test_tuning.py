"""Tuning on a real GPU: real timers, every admitted backend, and calls that follow the result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fp8dispatch
from fp8dispatch import decide, trust
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.tuning import orders
from fp8dispatch.tuning.timing import DeviceTimer

pytestmark = pytest.mark.gpu

N, K = 1024, 2048


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("FP8DISPATCH_CACHE_DIR", str(tmp_path))
    orders.forget()
    trust.forget()
    decide.forget()
    yield tmp_path
    orders.forget()
    trust.forget()
    decide.forget()


@pytest.mark.parametrize("recipe", ["tensor", "row", "block"])
def test_calls_follow_what_was_measured(recipe: str, home: Path) -> None:
    # TorchAO times 48 configurations for each size, which takes longer than all the rest.
    report = fp8dispatch.tune((N, K), recipe, tokens=(3, 256), backends="-torchao", progress=False)

    assert report.wrong == ()
    assert report.file is not None
    assert report.file.parent == home / "tuned"
    weight, scale = fp8dispatch.quantize(torch.randn(N, K, device="cuda"), recipe)
    for point in report.points:
        assert {"triton", "eager"} <= set(point.order), point.arms
        tiles = [arm for arm in point.arms if arm.tile is not None]
        assert tiles
        assert {arm.state for arm in tiles} == {"timed"}, "a tile raised, or changed a bit"
        assert all(us > 0 for us in point.us.values())
        x = torch.randn(point.size.m, K, device="cuda", dtype=torch.bfloat16)
        decision = fp8dispatch.explain(x, weight, scale)
        assert decision.backend == point.order[0]
        assert decision.route.startswith("tuned, ")
        assert decision.problem.tile == point.tiles.get(decision.backend)


def test_the_timer_sees_the_work_on_the_device() -> None:
    timer = DeviceTimer(torch.device("cuda", torch.cuda.current_device()))
    small, large = (torch.randn(size, size, device="cuda") for size in (64, 8192))

    assert 0 < timer(lambda: small @ small) < timer(lambda: large @ large)


def test_a_capture_that_is_under_way_is_refused_and_survives() -> None:
    held = torch.zeros(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held += 1
        with pytest.raises(InvalidInputError, match="outside of a CUDA graph's capture"):
            fp8dispatch.tune((N, K), progress=False)
    graph.replay()
    torch.cuda.synchronize()

    assert held.tolist() == [1.0] * 4
