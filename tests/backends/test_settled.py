"""Ready launches are used where they are known to fit, and the ordinary way everywhere else."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import plans, registry
from fp8dispatch.backends.compute import settled
from fp8dispatch.backends.compute.settled import Ready, Settled
from fp8dispatch.backends.eager import Eager
from fp8dispatch.recipe import BLOCK_128
from tests import oracle
from tests.backends.cases import Call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8dispatch.backends.contract import Weight

M, N, K = 5, 40, 144


class World:
    """What the host knows of streams and devices."""

    stream, device, capturing = 1, None, False


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    one = World()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda d: one.stream, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: one.device, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_isCurrentStreamCapturing", lambda: one.capturing, raising=False
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: one.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: one.capturing)
    return one


class Recorded:
    """A backend whose ready launches compute with plain torch, for a stream and form that they keep
    to; `way` says how each call went."""

    def __init__(self, call: Call) -> None:
        self.way: list[str] = []
        self.made = 0
        self.backend = Eager()
        self.call = call
        recorded = self

        class Told(Eager):
            def linear(self, *arguments: Any) -> torch.Tensor:
                recorded.way.append("ordinary")
                return recorded.backend.linear(*arguments)

        self.settled = Settled(
            Told(), call.weight, None, call.problem, torch.device("cpu"), self._make
        )

    def _make(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, static: Any
    ) -> Ready:
        self.made += 1
        form = (torch._C._cuda_getCurrentRawStream(0), threading.get_ident(), x.stride())
        held: list[torch.Tensor] = []

        def quantize(given: torch.Tensor) -> None:
            now = (torch._C._cuda_getCurrentRawStream(0), threading.get_ident(), given.stride())
            assert now == form
            held.append(given)

        def multiply(out: torch.Tensor) -> None:
            self.way.append("ready")
            problem = self.call.problem
            out.copy_(self.backend.linear(held.pop(), weight, bias, None, problem))

        return Ready(quantize, multiply, ())

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.settled(x, self.call.weight.data, bias)


@pytest.fixture
def recorded(world: World) -> Recorded:
    return Recorded(Call(M, N, K, BLOCK_128))


def test_the_second_call_is_ready_and_computes_the_same(recorded: Recorded) -> None:
    inputs = [torch.randn(M, K, dtype=torch.bfloat16) for _ in range(4)]
    call = recorded.call
    expected = [Eager().linear(x, call.weight, None, None, call.problem) for x in inputs]
    found = [recorded(x) for x in inputs]
    assert recorded.way == ["ordinary", "ready", "ready", "ready"]
    assert recorded.made == 1
    for one, right in zip(found, expected, strict=True):
        assert torch.equal(one, right)
        assert (one.shape, one.dtype, one.stride()) == (right.shape, right.dtype, right.stride())
    assert len({one.data_ptr() for one in found}) == 4  # each call has an output of its own


def test_a_bias_belongs_to_the_launch(recorded: Recorded) -> None:
    x = torch.randn(M, K, dtype=torch.bfloat16)
    biases = [torch.randn(N), torch.randn(N), None]
    for _ in range(2):
        for bias in biases:
            right = Eager().linear(x, recorded.call.weight, bias, None, recorded.call.problem)
            assert torch.equal(recorded(x, bias), right)
    assert recorded.way == ["ordinary"] * 3 + ["ready"] * 3


def test_each_stream_form_of_x_and_thread_has_launches_of_its_own(
    recorded: Recorded, world: World
) -> None:
    x = torch.randn(M, K, dtype=torch.bfloat16)
    strided = torch.randn(M, 2 * K, dtype=torch.bfloat16)[:, ::2]
    odd = torch.randn(M * K + 1, dtype=torch.bfloat16)[1:].view(M, K)
    for one in (x, strided, odd):
        recorded(one)
        recorded(one)
    world.stream = 2
    recorded(x)
    recorded(x)
    thread = threading.Thread(target=lambda: (recorded(x), recorded(x)))
    thread.start()
    thread.join()
    assert recorded.way == ["ordinary", "ready"] * 5
    world.stream = 1
    recorded(x)
    assert recorded.way[-1] == "ready"


def test_captured_calls_and_those_from_another_device_go_the_ordinary_way(
    recorded: Recorded, world: World
) -> None:
    x = torch.randn(M, K, dtype=torch.bfloat16)
    world.capturing = True
    recorded(x)
    recorded(x)
    assert recorded.made == 0  # memory of a captured call is the graph's
    world.capturing = False
    recorded(x)
    recorded(x)
    assert recorded.way == ["ordinary"] * 3 + ["ready"]
    world.capturing = True
    recorded(x)
    world.capturing, world.device = False, 3
    recorded(x)
    world.device = None
    recorded(x)
    assert recorded.way[4:] == ["ordinary", "ordinary", "ready"]


def test_activations_too_large_to_be_kept_are_never_ready(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settled, "is_small", lambda m, k, groups: False)
    large = Recorded(Call(M, N, K, BLOCK_128))
    x = torch.randn(M, K, dtype=torch.bfloat16)
    large(x)
    large(x)
    assert large.way == ["ordinary"] * 2


def test_what_cannot_be_made_ready_is_tried_once(world: World) -> None:
    recorded = Recorded(Call(M, N, K, BLOCK_128))
    tried: list[int] = []
    recorded.settled._make = lambda *arguments: tried.append(1)  # type: ignore[assignment]
    x = torch.randn(M, K, dtype=torch.bfloat16)
    for _ in range(3):
        recorded(x)
    assert recorded.way == ["ordinary"] * 3
    assert len(tried) == 1


@pytest.fixture
def forgotten() -> Iterator[None]:
    plans._plans.clear()
    yield
    plans._plans.clear()


def test_a_repeated_linear_takes_what_its_backend_has_settled(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every leading shape; a failure there is a failure of the backend."""
    backend = registry.load("eager")
    asked: list[tuple[int, ...]] = []

    def settle(weight: Weight, static: Any, problem: Any, device: torch.device) -> Any:
        def again(x: torch.Tensor, data: torch.Tensor, bias: Any) -> torch.Tensor:
            asked.append(tuple(x.shape))
            return backend.linear(x, weight._replace(data=data), bias, static, problem) * 2

        return again

    monkeypatch.setattr(backend, "settled", settle, raising=False)
    weight, scale = oracle.make_weight(N, K, BLOCK_128)
    x = torch.randn(6, K)
    first = fp8dispatch.fp8_linear(x, weight, scale, backend="eager")
    assert torch.equal(fp8dispatch.fp8_linear(x, weight, scale, backend="eager"), first * 2)
    folded = fp8dispatch.fp8_linear(x.view(2, 3, K), weight, scale, backend="eager")
    assert torch.equal(folded, (first * 2).view(2, 3, N))
    assert asked == [(6, K), (6, K)]


def test_a_settled_linear_keeps_no_weight_alive(world: World) -> None:
    call = Call(M, N, K, BLOCK_128)
    recorded = Recorded(call)
    ready = Ready(lambda x: None, lambda out: None, ())
    recorded.settled._make = lambda *arguments: ready
    x, bias = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(N)
    for _ in range(2):
        recorded(x, bias)
    held = weakref.ref(call.weight.data), weakref.ref(bias)
    del recorded.call, call, bias
    gc.collect()
    assert [one() for one in held] == [None, None]
