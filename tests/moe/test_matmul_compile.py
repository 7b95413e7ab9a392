"""Expert matmuls under torch.compile: one operator, the numbers of eager, no recompilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fp8dispatch import FrozenWeightError, InvalidInputError, ShapeError
from fp8dispatch.recipe import BLOCK_128, ROW
from tests.moe.cases import WAYS, Call, make_call
from tests.test_ops import bytes_compare  # noqa: F401  # a fixture


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(call: Call, backend: Any = "aot_eager", **options: Any) -> Callable[..., torch.Tensor]:
    def function(**tensors: torch.Tensor) -> torch.Tensor:
        return call.run(**tensors)

    made: Callable[..., torch.Tensor] = torch.compile(
        function, backend=backend, fullgraph=True, **options
    )
    return made


@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_gradients_are_those_of_eager(way: str) -> None:
    call = make_call(way, BLOCK_128, 4, 24, 40, 8, bias=torch.float32, sentinels=0.3)
    grad = torch.randn(8, 24).bfloat16()
    results = []
    for run in (call.run, compiled(call)):
        x, bias = (call.arguments[name].detach().requires_grad_() for name in ("x", "bias"))
        out = run(x=x, bias=bias)
        torch.autograd.backward(out, grad)
        results.append((out, x.grad, bias.grad))

    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_a_call_is_one_operator_and_nothing_else() -> None:
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op[:4] == "call"])
        return graph.forward

    call = make_call("grouped", ROW, 4, 8, 16, 6)
    compiled(call, record)(x=call.arguments["x"])

    assert graphs == [["fp8dispatch.experts.default"]]


def test_another_number_of_rows_does_not_recompile() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    call = make_call("batched", ROW, 4, 8, 16, 6)
    run = compiled(call, counter, dynamic=True)
    for rows in (6, 9, 40, 3):
        x, ids = torch.randn(rows, 16).bfloat16(), torch.randint(-1, 5, (rows,))
        assert torch.equal(run(x=x, expert_ids=ids), call.run(x=x, expert_ids=ids))

    assert counter.frame_count == 1


def test_checkpointing_under_a_compiler() -> None:
    call = make_call("batched-gather", ROW, 4, 8, 16, 6, bias=torch.float32)
    x = call.arguments["x"].float().requires_grad_()
    (expected,) = torch.autograd.grad(call.run(x=x).square().sum(), x)

    def function(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(lambda x: call.run(x=x), x, use_reentrant=False)
        return out.square().sum()

    (got,) = torch.autograd.grad(torch.compile(function, backend="aot_eager")(x), x)

    assert torch.equal(got, expected)


def test_a_frozen_weight_raises_when_backward_runs() -> None:
    call = make_call("batched", ROW, 4, 8, 16, 6)
    weight = torch.nn.Parameter(call.arguments["weight"])
    out = compiled(call)(weight=weight)

    with pytest.raises(FrozenWeightError, match="weight requires grad"):
        torch.autograd.backward(out.sum())


def test_debug_checks_values_when_the_graph_runs() -> None:
    call = make_call("grouped", ROW, 3, 8, 16, 6)
    call.options["debug"] = True
    run = compiled(call)

    run(offsets=torch.tensor([1, 2, 6]))
    with pytest.raises(InvalidInputError, match="offsets must rise from 0, found 1 after 4"):
        run(offsets=torch.tensor([4, 1, 6]))


def test_fake_tensors_have_the_shape_and_the_checks() -> None:
    call = make_call("grouped-index", ROW, 3, 8, 16, 6)
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value)
            for name, value in call.arguments.items()
            if isinstance(value, torch.Tensor)
        }
        out = call.run(**fake)
        with pytest.raises(ShapeError, match="offsets must be"):
            call.run(**{**fake, "offsets": fake["offsets"][:2]})

    assert out.shape == (6, 8)
    assert out.dtype == torch.bfloat16


@pytest.mark.usefixtures("bytes_compare")
def test_the_operators_pass_torchs_own_checks() -> None:
    call = make_call("grouped-index", BLOCK_128, 3, 8, 16, 6, bias=torch.float32)
    named = call.arguments
    x, bias = (named[name].detach().requires_grad_() for name in ("x", "bias"))
    weight, scale = named["weight"], named["weight_scale"]
    routing = named["offsets"], named["gather"], named["scatter"], False
    operators, grad = torch.ops.fp8dispatch, torch.randn(6, 8)

    torch.library.opcheck(
        operators.experts.default,
        (
            x,
            weight,
            scale,
            routing[0],
            bias,
            None,
            *routing[1:],
            128,
            128,
            torch.float32,
            "",
            False,
        ),
    )
    torch.library.opcheck(
        operators.experts_grad_input.default,
        (grad, weight, scale, *routing, x.shape[0], 128, 128, torch.bfloat16),
    )
    torch.library.opcheck(
        operators.experts_grad_bias.default, (grad, *routing, x.shape[0], 3, torch.float32)
    )
