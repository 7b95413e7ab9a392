"""The decode kernel that starts while our quantiser runs: nothing written before is overtaken.

`write_late` is the worst neighbour there can be: it lets the next kernel start at once, sleeps, and
then writes the weight. Behind it comes our quantiser, launched in the order of the stream. That the
test would see an overtaken write is a test of its own, with a quantiser that may start early.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import plans
from fp8dispatch.backends.gluon import BACKEND
from fp8dispatch.probes.device import describe
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Recipe
from tests import oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Repeats = tuple[Callable[[torch.Tensor], None], Callable[[torch.Tensor], None]]

pytestmark = pytest.mark.gpu

N, K = 4096, 1024  # the rings of 64 programs hold the whole weight: all of it is copied early


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Turn early starts on, or skip where the backend or direct launches do not run."""
    device = torch.device("cuda", 0)
    reasons = BACKEND.refuse_machine(describe(device)) or BACKEND.loadable(BLOCK_128)
    if reasons:
        pytest.skip("; ".join(f"gluon {reason}" for reason in reasons))
    from fp8dispatch.kernels import hopper_launch
    from fp8dispatch.kernels.gluon_launch import direct_launch

    if not direct_launch(0):
        pytest.skip("launches are not direct with this Triton")
    monkeypatch.setattr(hopper_launch, "PROGRAMMATIC", True)
    monkeypatch.setattr(hopper_launch, "PROGRAMMATIC_IN_GRAPHS", True)
    plans._plans.clear()
    yield
    plans._plans.clear()


def ordinary(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same numbers with every launch in the order of the stream."""
    from fp8dispatch.kernels import hopper_launch

    hopper_launch.PROGRAMMATIC = False
    try:
        return fp8dispatch.fp8_linear(x, weight.clone(), scale.clone(), backend="gluon")
    finally:
        hopper_launch.PROGRAMMATIC = True


class Rewritten:
    """A weight that is written over and over, and what a linear over each content gives."""

    def __init__(self, m: int, recipe: Recipe = BLOCK_128, n: int = N, k: int = K) -> None:
        made = [oracle.make_weight(n, k, recipe, device="cuda") for _ in range(2)]
        self.contents = [weight for weight, _ in made]
        self.scale = made[0][1]
        self.x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        self.weight = self.contents[0].clone()
        self.expected = [ordinary(self.x, one, self.scale) for one in self.contents]
        truth = oracle.linear_truth(self.x, self.contents[0], self.scale, recipe)
        oracle.assert_matches(self.expected[0], truth)
        for _ in range(3):  # launches are ready from here on
            self.linear()

    def linear(self) -> torch.Tensor:
        return fp8dispatch.fp8_linear(self.x, self.weight, self.scale, backend="gluon")

    def bytes_of(self, content: int) -> torch.Tensor:
        return self.contents[content].view(torch.uint8).view(-1)


def prepared(rewritten: Rewritten, *, quantizer_early: bool) -> tuple[torch.Tensor, Repeats]:
    """An output, and the two launches that fill it; the quantiser may be let start early too."""
    from fp8dispatch.backends.compute import gluon
    from fp8dispatch.backends.contract import Weight
    from fp8dispatch.kernels import hopper_launch
    from fp8dispatch.kernels.direct_launch import plain_kernel
    from fp8dispatch.kernels.quantize_activation import quantize_groups
    from fp8dispatch.problem import LinearProblem
    from fp8dispatch.workspace import quantized_activations

    x, weight, scale = rewritten.x, rewritten.weight, rewritten.scale
    (m, k), n = x.shape, weight.shape[0]
    problem = LinearProblem(m, n, k, BLOCK_128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16", False)
    operand = Weight(weight, scale, BLOCK_128, scale)
    data, x_scale = quantized_activations(x.device, m, k, scale.shape[1])
    operands = gluon._operands(BACKEND, data, x_scale, operand, None, problem, None)
    hopper_launch.quantize(x, data, x_scale, 128, dependents=True)
    operands.plan.run(*operands[1:])  # both are compiled
    made: list[Any] = []

    def keep(function: Any, programs: int, arguments: Any, constants: Any, warps: int) -> None:
        kernel = plain_kernel(function, arguments, constants, warps)
        place = x.get_device()
        made.append(
            kernel.repeat((programs, 1), (), arguments, place, 0, programmatic=quantizer_early)
        )

    quantize_groups(x, data, x_scale, 128, keep, dependents=True)
    multiply = operands.plan.repeat(*operands[1:], behind_quantizer=True)
    return operands.out, (made[0], multiply)


def test_a_quantiser_that_starts_early_would_be_seen() -> None:
    """What the other tests rely on: with it the old weight is multiplied.

    Only the quantiser's launch differs. A host that is held up for longer than the write sleeps
    would hide it, so one of a few turns is enough.
    """
    from tests.gpu.late_write import write_late

    rewritten = Rewritten(16)
    seen = {}
    for quantizer_early in (True, False):
        out, (quantize, multiply) = prepared(rewritten, quantizer_early=quantizer_early)
        overtaken = []
        for turn in range(6):
            content = turn % 2
            rewritten.weight.view(torch.uint8).view(-1).copy_(rewritten.bytes_of(1 - content))
            torch.cuda.synchronize()
            write_late(rewritten.weight, rewritten.contents[content])
            quantize(rewritten.x)
            multiply(out)
            torch.cuda.synchronize()
            overtaken.append(not torch.equal(out, rewritten.expected[content]))
        seen[quantizer_early] = overtaken
    assert any(seen[True]), "this machine starts nothing early, so the other tests say nothing"
    assert not any(seen[False])


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("late", [True, False], ids=["late write", "copy"])
def test_a_weight_written_just_before_is_the_one_multiplied(m: int, late: bool) -> None:
    from tests.gpu.late_write import write_late

    rewritten = Rewritten(m)
    outs = []
    for turn in range(100):
        source = rewritten.contents[turn % 2]
        if late:
            write_late(rewritten.weight, source)
        else:
            rewritten.weight.view(torch.uint8).copy_(source.view(torch.uint8))
        outs.append(rewritten.linear())
    for turn, out in enumerate(outs):
        assert torch.equal(out, rewritten.expected[turn % 2]), turn


def test_activations_written_just_before_are_the_ones_multiplied() -> None:
    from tests.gpu.late_write import write_late

    rewritten = Rewritten(16)
    inputs = [torch.randn_like(rewritten.x) for _ in range(2)]
    expected = [ordinary(x, rewritten.weight, rewritten.scale) for x in inputs]
    outs = []
    for turn in range(100):
        write_late(rewritten.x, inputs[turn % 2])
        outs.append(rewritten.linear())
    for turn, out in enumerate(outs):
        assert torch.equal(out, expected[turn % 2]), turn


@pytest.mark.parametrize("late", [True, False], ids=["late write", "copy"])
def test_in_a_graph_too(late: bool) -> None:
    from tests.gpu.late_write import write_late

    rewritten = Rewritten(16)
    source = rewritten.contents[0].clone()
    write_late(rewritten.weight, source)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if late:
            write_late(rewritten.weight, source)
        else:
            rewritten.weight.view(torch.uint8).copy_(source.view(torch.uint8))
        outs = [rewritten.linear() for _ in range(3)]
    for turn in range(50):
        source.view(torch.uint8).copy_(rewritten.contents[turn % 2].view(torch.uint8))
        graph.replay()
        for out in outs:
            assert torch.equal(out, rewritten.expected[turn % 2]), turn
            out.fill_(float("nan"))


@pytest.mark.parametrize("recipe", [BLOCK_128, ROW, TENSOR], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 201, 1040), (16, 512, 7168), (33, 4096, 7168), (64, 24_576, 1536)]
)
def test_a_chain_of_linears_shares_its_memory_in_turns(
    m: int, n: int, k: int, recipe: Recipe
) -> None:
    """Activations, partial sums and counters of one call are those of the next: 200 of them."""
    first, second = Rewritten(m, recipe, n, k), Rewritten(m, recipe, n, k)
    outs = [one.linear() for _ in range(100) for one in (first, second)]
    for index, out in enumerate(outs):
        assert torch.equal(out, (first, second)[index % 2].expected[0]), index


def test_what_follows_sees_the_whole_output() -> None:
    """The next kernel, and the next linear, read what the last one wrote."""
    rewritten = Rewritten(16, n=K)
    expected = rewritten.x
    for _ in range(20):
        expected = ordinary(expected, rewritten.weight, rewritten.scale)
        expected = expected / expected.abs().amax()
    for _ in range(20):
        found = rewritten.x
        for _ in range(20):
            found = fp8dispatch.fp8_linear(
                found, rewritten.weight, rewritten.scale, backend="gluon"
            )
            found = found / found.abs().amax()
        assert torch.equal(found, expected)


def test_threads_on_one_stream_do_not_disturb_each_other() -> None:
    rewritten = [Rewritten(m) for m in (1, 16, 33, 64)]
    wrong: list[int] = []

    def work(index: int) -> None:
        one = rewritten[index]
        outs = [one.linear() for _ in range(300)]
        torch.cuda.synchronize()
        if not all(torch.equal(out, one.expected[0]) for out in outs):
            wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_activations_that_come_quantised_are_launched_in_order() -> None:
    """What made them is not known: it may be anything, written any time before."""
    from fp8dispatch.kernels.direct_launch import Kernel

    flags: list[bool] = []
    call = Kernel.__call__

    def watched(self: Kernel, *arguments: Any, programmatic: bool = False) -> None:
        flags.append(programmatic)
        call(self, *arguments, programmatic=programmatic)

    rewritten = Rewritten(16)
    made = fp8dispatch.QuantizedActivation.from_tensor(rewritten.x, group_size=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "__call__", watched)
        out = fp8dispatch.fp8_linear_quantized(
            made, rewritten.weight, rewritten.scale, backend="gluon"
        )
    assert flags == [False]
    assert torch.equal(out, rewritten.expected[0])
