"""An FP8 dgrad under torch.compile: stated when the forward pass runs, wherever backward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fp8dispatch
from fp8dispatch import (
    BackendUnavailableError,
    ConfigurationError,
    fp8_linear,
    graph_policy,
    policy,
    registry,
    use_backend,
)
from fp8dispatch.policy import Policy
from fp8dispatch.problem import Accuracy, Dgrad
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.fp8_gradients import every_recipe
from tests.test_compile import messages
from tests.test_ops import (
    BLOCK,
    ROWS,
    K,
    N,
    arguments_of,
    backends,
    compiled,
    layer,
)

Call = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    fp8dispatch.set_backend()
    yield
    torch._dynamo.reset()
    fp8dispatch.set_backend()
    monkeypatch.undo()
    policy.reload_environment()


@pytest.fixture
def linear() -> Call:
    weight, scale = oracle.make_weight(N, K, BLOCK)

    def call(x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, weight, scale)

    return call


def gradients(call: Call, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(call(x), x, grad)[0]


def example(m: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(m, K, requires_grad=True), torch.randn(m, N)


@backends
@every_recipe
def test_forward_and_backward_equal_eager(recipe: Recipe, backend: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe)
    x = torch.randn(2, 7, K, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 7, N).bfloat16()

    def call(x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, weight, scale, block_size=recipe.block_size)

    run = compiled(call, backend)
    with use_backend(dgrad="fp8"):
        outs = run(x), call(x)
    # Outside of the statement and on another thread, as backward on a GPU is.
    with ThreadPoolExecutor(1) as other:
        got, wanted = other.submit(
            lambda: [torch.autograd.grad(out, x, grad)[0] for out in outs]
        ).result()

    assert torch.equal(outs[0], outs[1])
    assert torch.equal(got, wanted)
    assert got.stride() == wanted.stride()
    assert not torch.equal(got, torch.autograd.grad(call(x), x, grad)[0])


@backends
@pytest.mark.parametrize("dynamic", [None, True])
def test_other_row_counts_do_not_recompile(dynamic: bool | None, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    linear = layer()  # of plain arguments, torch takes equal sizes for one and the same
    run = compiled(linear, counter, dynamic=dynamic)
    with use_backend(dgrad="fp8"):
        for m in ROWS:
            x, grad = example(m)
            assert torch.equal(gradients(run, x, grad), gradients(linear, x, grad))
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.parametrize("place", ["use_backend", "set_backend", "environment"])
def test_what_is_stated_later_holds_later(
    place: str, linear: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that was recorded under another statement must not run as if it were this one."""
    run = compiled(linear)
    x, grad = example()
    usual = gradients(linear, x, grad)
    with use_backend(dgrad="fp8"):
        fp8 = gradients(linear, x, grad)
    assert torch.equal(gradients(run, x, grad), usual)
    if place == "use_backend":
        with use_backend(dgrad="fp8"):
            assert torch.equal(gradients(run, x, grad), fp8)
            with use_backend(dgrad="dequantized"):
                assert torch.equal(gradients(run, x, grad), usual)
            with use_backend("eager", batch_invariant=False):
                assert torch.equal(gradients(run, x, grad), fp8)
    elif place == "set_backend":
        fp8dispatch.set_backend(dgrad="fp8")
        assert torch.equal(gradients(run, x, grad), fp8)
        fp8dispatch.set_backend()
    else:
        monkeypatch.setenv(policy.DGRAD_VARIABLE, "fp8")
        policy.reload_environment()
        assert torch.equal(gradients(run, x, grad), fp8)
        monkeypatch.delenv(policy.DGRAD_VARIABLE)
        policy.reload_environment()
    assert torch.equal(gradients(run, x, grad), usual)


def test_an_environment_that_was_not_read_yet_is_read_once(
    linear: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(policy.DGRAD_VARIABLE, "fp8")
    policy.reload_environment()
    counter = CompileCounterWithBackend("eager")
    run = compiled(linear, counter)
    x, grad = example()
    for _ in range(2):
        assert torch.equal(gradients(run, x, grad), gradients(linear, x, grad))
    assert counter.frame_count == 1


def test_backward_honours_the_policy_that_forward_ran_under(linear: Call) -> None:
    seen: list[Policy | None] = []
    run = compiled(linear, "aot_eager")
    x, grad = example()
    decode = graph_policy.decode
    with (
        pytest.MonkeyPatch.context() as patch,
        use_backend("triton,eager", accuracy="fast", dgrad="fp8"),
    ):
        out = run(x)
        stated = policy.resolve(None, registry.NAMES)
        patch.setattr(graph_policy, "decode", lambda text: seen.append(decode(text)) or seen[-1])
        torch.autograd.grad(out, x, grad)
    assert seen == [stated]
    assert stated.accuracy is Accuracy.FAST


@backends
def test_a_weight_without_an_fp8_dgrad_is_refused_when_forward_runs(backend: str) -> None:
    weight, scale = oracle.make_weight(N, K, oracle.RECIPES["block-1x128"])
    run = compiled(lambda x: fp8_linear(x, weight, scale), backend)
    x, _ = example()
    with use_backend(dgrad="fp8"):
        with pytest.raises(Exception, match="found groups") as caught:
            run(x)
        assert "BackendUnavailableError" in repr(caught.value) or "dgrad=" in messages(caught.value)
        with torch.no_grad():
            run(x)


def test_the_text_of_a_policy() -> None:
    for allowed in (
        Policy(dgrad=Dgrad.FP8),
        Policy(("triton", "eager"), ("cublaslt",), Accuracy.FAST, True, "use_backend", Dgrad.FP8),
        Policy(dgrad=Dgrad.FP8, tuned=False),
    ):
        assert graph_policy.decode(graph_policy.encode(allowed)) == allowed
        graph_policy.check(graph_policy.encode(allowed), allowed)
        graph_policy.check("", allowed)
        with pytest.raises(ConfigurationError, match="compiled for the policy"):
            graph_policy.check(graph_policy.encode(allowed), Policy())
        with pytest.raises(ConfigurationError, match="compiled for the policy dequantized"):
            graph_policy.check("dequantized", allowed)
    assert graph_policy.decode("") is graph_policy.decode("dequantized") is None
    graph_policy.check("dequantized", Policy(("eager",)))


def test_a_graph_of_another_policy_does_not_run_unnoticed() -> None:
    x, *rest = arguments_of("linear", BLOCK, (5,))
    text = graph_policy.encode(Policy(dgrad=Dgrad.FP8))
    with pytest.raises(ConfigurationError, match="is stated now"):
        torch.ops.fp8dispatch.linear(x, *rest, text)


def test_fake_tensors() -> None:
    weight, scale = oracle.make_weight(N, K, BLOCK)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, use_backend(dgrad="fp8"):
        x = torch.empty(2, 7, K, dtype=torch.float16, requires_grad=True)
        out = fp8_linear(x, mode.from_tensor(weight), mode.from_tensor(scale))
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("use_reentrant", [False])  # torch.compile takes no reentrant one
def test_gradient_checkpointing(use_reentrant: bool, linear: Call) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: linear(torch.tanh(x)), x, use_reentrant=use_reentrant)

    x, grad = example()
    with use_backend(dgrad="fp8"):
        out = compiled(call, "aot_eager")(x)
        expected = gradients(call, x, grad)

    (got,) = torch.autograd.grad(out, x, grad)

    assert torch.equal(got, expected)


def test_a_module_is_compiled_as_it_is_run() -> None:
    fp8: Any = layer()
    x, grad = example()
    with use_backend(dgrad="fp8"):
        out, expected = compiled(fp8, "aot_eager")(x), fp8(x)
    got, wanted = (torch.autograd.grad(y, (x, fp8.bias), grad) for y in (out, expected))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_operators_refuse_what_calls_refuse() -> None:
    x, *rest = arguments_of("linear", oracle.RECIPES["block-1x64"], (5,))
    text = graph_policy.encode(Policy(dgrad=Dgrad.FP8))
    with use_backend(dgrad="fp8"), pytest.raises(BackendUnavailableError, match="found groups"):
        torch.ops.fp8dispatch.linear(x, *rest, text)
