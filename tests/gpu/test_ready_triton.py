"""The Triton backend with launches made ready: the same bits as through Triton's own launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fp8dispatch
from fp8dispatch import plans
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle
from tests.gpu import synchronisation

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gpu

RECIPES = [TENSOR, ROW, BLOCK_128, Recipe(Granularity.BLOCK, (1, 32))]


@pytest.fixture(autouse=True)
def ready(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Turn ready launches on for this device, or skip where launches are not direct."""
    from fp8dispatch.backends.compute import triton
    from fp8dispatch.kernels.direct_launch import direct_launch

    capability = torch.cuda.get_device_capability(0)
    if not direct_launch(0, tensor_maps=False):
        pytest.skip("launches are not direct with this Triton")
    if capability >= (9, 0) and not direct_launch(0, tensor_maps=True):
        pytest.skip("tensor maps are not passed directly with this Triton")
    monkeypatch.setattr(triton, "DIRECT_CAPABILITIES", (capability,))
    plans._plans.clear()
    yield
    plans._plans.clear()


def ordinary(*tensors: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor:
    """Over clones: a call that has never been seen."""
    x, weight, scale, bias = (None if one is None else one.clone() for one in tensors)
    return fp8dispatch.fp8_linear(x, weight, scale, bias, activation_scale=given, backend="triton")


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("m", [1, 16, 64, 65, 300, 1000])
def test_ready_launches_give_the_same_bits(m: int, recipe: Recipe, static: bool) -> None:
    """Ragged N, K with and without a tail, every dtype, strided X, biases, other inputs."""
    given = torch.tensor([0.02], device="cuda") if static else None
    for n, k in ((264, 1024), (201, 528), (4096, 160)):
        weight, scale = oracle.make_weight(n, k, recipe, device="cuda")
        bias = torch.randn(n, device="cuda")
        wide = torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16)
        inputs = [
            torch.randn(m, k, device="cuda", dtype=dtype)
            for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
        ]
        for x in (*inputs, wide[:, ::2], wide[:, k:]):
            for added in (None, bias):
                expected = ordinary(x, weight, scale, added, given=given)
                for _ in range(4):
                    found = fp8dispatch.fp8_linear(
                        x, weight, scale, added, activation_scale=given, backend="triton"
                    )
                    assert torch.equal(found, expected), (n, k, x.dtype, x.stride())
                    found.fill_(float("nan"))


def test_ready_launches_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8dispatch.kernels.repeat_launch import MappedRepeat, Repeat

    launched: list[int] = []
    for kind in (Repeat, MappedRepeat):
        call = kind.__call__

        def watched(self: Repeat, tensor: torch.Tensor, call: object = call) -> None:
            launched.append(1)
            call(self, tensor)  # type: ignore[operator]

        monkeypatch.setattr(kind, "__call__", watched)
    weight, scale = oracle.make_weight(264, 1024, BLOCK_128, device="cuda")
    x = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        fp8dispatch.fp8_linear(x, weight, scale, backend="triton")
    assert len(launched) == 2 * 2  # the third and the fourth call, two launches each


def test_streams_and_graphs() -> None:
    weight, scale = oracle.make_weight(264, 1024, BLOCK_128, device="cuda")
    x = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
    expected = ordinary(x, weight, scale, None, given=None)

    def linear() -> torch.Tensor:
        return fp8dispatch.fp8_linear(x, weight, scale, backend="triton")

    for _ in range(3):
        linear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [linear() for _ in range(3)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    found = []
    for _ in range(20):
        with torch.cuda.stream(side):
            graph.replay()
            found.append(linear())
        found.append(linear())
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in (*captured, *found))


def test_a_ready_call_does_not_synchronise() -> None:
    weight, scale = oracle.make_weight(264, 1024, BLOCK_128, device="cuda")
    x = torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        first = fp8dispatch.fp8_linear(x, weight, scale, backend="triton")
    with synchronisation.forbidden():
        again = fp8dispatch.fp8_linear(x, weight, scale, backend="triton")
    assert torch.equal(first, again)
