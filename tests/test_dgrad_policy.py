"""An FP8 dgrad is computed where it is stated and nowhere else, and refused before forward runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fp8dispatch
from fp8dispatch import (
    BackendUnavailableError,
    ConfigurationError,
    decide,
    dgrad,
    fp8_linear,
    policy,
    registry,
    trust,
    use_backend,
)
from fp8dispatch.backends.contract import Weight
from fp8dispatch.problem import Accuracy, Dgrad, LinearProblem
from fp8dispatch.recipe import Granularity, Recipe
from tests import fp8_gradients, oracle
from tests.fp8_gradients import BLOCK, GROUPS, K, N, gradient, layer
from tests.oracle import RECIPES

if TYPE_CHECKING:
    from collections.abc import Iterator

Products = list[tuple[LinearProblem, Weight]]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    return fp8_gradients.watch(monkeypatch)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    monkeypatch.undo()
    policy.reload_environment()


@pytest.mark.parametrize("recipe", GROUPS.values(), ids=GROUPS.keys())
def test_groups_are_refused_before_the_forward_pass_runs(
    recipe: Recipe, device: str, products: list[Any]
) -> None:
    weight, scale = layer(recipe, device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    with use_backend(dgrad="fp8"):
        with pytest.raises(BackendUnavailableError, match=r"found groups .* dgrad=\"dequantized\""):
            fp8_linear(x, weight, scale)
        assert products == []
        with pytest.raises(BackendUnavailableError, match="found groups"):
            fp8_linear(x.to("meta"), weight.to("meta"), scale.to("meta"))
        # Nobody asks for a gradient of X here.
        with torch.no_grad():
            fp8_linear(x, weight, scale)
        bias = torch.zeros(N, device=device, requires_grad=True)
        fp8_linear(x.detach(), weight, scale, bias).sum().backward()
        with use_backend(dgrad="dequantized"):
            fp8_linear(x, weight, scale).sum().backward()
    assert bias.grad is not None
    assert x.grad is not None


def test_a_backend_that_quantises_nothing_is_no_fp8_dgrad(device: str) -> None:
    weight, scale = layer(device=device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    sentence = r'takes the gradient of X .* weight_only needs dgrad="dequantized"'
    with use_backend(dgrad="fp8"), pytest.raises(BackendUnavailableError, match=sentence):
        fp8_linear(x, weight, scale, backend="weight_only")
    # In a list it is passed over, for this product alone.
    allowed = policy.Policy(only=("weight_only", "eager"), dgrad=Dgrad.FP8)
    decision = dgrad.explain(5, weight, BLOCK, x.dtype, allowed)
    assert decision.backend == "eager"
    assert [reason.code for reason in dict(decision.refusals)["weight_only"]] == ["gradient"]


def test_a_backend_that_fails_is_put_aside_in_backward_too(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scale = layer(device=device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device)
    backend = registry.load("triton")
    matmul = backend.matmul

    def failing(x: Any, weight: Any, bias: Any, problem: LinearProblem) -> torch.Tensor:
        if problem.gradient:
            raise RuntimeError("planted")
        return matmul(x, weight, bias, problem)

    monkeypatch.setattr(backend, "matmul", failing)
    with use_backend("triton,eager", dgrad="fp8"):
        out = fp8_linear(x, weight, scale)
    try:
        with pytest.warns(RuntimeWarning, match=r"triton failed on the gradient of X .*planted"):
            (got,) = torch.autograd.grad(out, x, grad)
    finally:
        trust.release("triton")
    oracle.assert_matches(got, fp8_gradients.truth(grad, weight, scale, BLOCK))


def test_the_canary_of_the_transposed_recipe_is_asked(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Recipe] = []
    standing = decide.standing

    def watched(name: str, device: Any, machine: Any, recipe: Recipe, **rest: Any) -> Any:
        asked.append(recipe)
        return standing(name, device, machine, recipe, **rest)

    monkeypatch.setattr(decide, "standing", watched)
    decide.forget()
    recipe = RECIPES["block-64x128"]
    weight, scale = layer(recipe, device)
    x = torch.randn(5, K, device=device, requires_grad=True)

    gradient(x, torch.randn(5, N), weight, scale, recipe, backend="triton")

    assert set(asked) == {recipe, Recipe(Granularity.BLOCK, (128, 64))}


def test_where_it_can_be_stated(environment: pytest.MonkeyPatch) -> None:
    known = registry.NAMES
    assert policy.resolve(None, known).dgrad is Dgrad.DEQUANTIZED
    environment.setenv(policy.DGRAD_VARIABLE, "fp8")
    policy.reload_environment()
    assert policy.resolve("triton", known).dgrad is Dgrad.FP8
    fp8dispatch.set_backend(dgrad="dequantized")
    try:
        assert policy.resolve(None, known).dgrad is Dgrad.DEQUANTIZED
        with use_backend("triton", dgrad=Dgrad.FP8):
            with use_backend("-cublaslt"):
                assert policy.resolve(None, known).dgrad is Dgrad.FP8
            with use_backend(dgrad="dequantized"):
                assert policy.resolve(None, known).dgrad is Dgrad.DEQUANTIZED
    finally:
        fp8dispatch.set_backend()
    environment.setenv(policy.DGRAD_VARIABLE, "fp4")
    policy.reload_environment()
    with pytest.raises(ConfigurationError, match="must be one of dequantized, fp8, found 'fp4'"):
        policy.resolve(None, known)
    for state in (use_backend, fp8dispatch.set_backend):
        with pytest.raises(ConfigurationError, match="dgrad must be one of"):
            state(dgrad="yes")


def test_a_decorated_function_states_it_in_every_call() -> None:
    @use_backend(dgrad="fp8")
    def stated() -> Dgrad:
        return policy.resolve(None, registry.NAMES).dgrad

    assert [stated(), stated()] == [Dgrad.FP8] * 2


def test_backward_on_another_thread_does_what_forward_stated(device: str) -> None:
    weight, scale = layer(device=device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device)
    expected = gradient(x, grad, weight, scale, BLOCK)
    with use_backend(dgrad="fp8"):
        out = fp8_linear(x, weight, scale)
    plain = fp8_linear(x, weight, scale)
    threads: list[int] = []

    def backward(out: torch.Tensor) -> torch.Tensor:
        threads.append(threading.get_ident())
        with use_backend(dgrad="dequantized"):
            return torch.autograd.grad(out, x, grad)[0]

    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(backward, out).result(), expected)
    with use_backend(dgrad="fp8"):
        (usual,) = torch.autograd.grad(plain, x, grad)
    oracle.assert_gradient(usual, grad, oracle.dequantized_weight(weight, scale, BLOCK))
    assert threads != [threading.get_ident()]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, device: str) -> None:
    weight, scale = layer(device=device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device)

    @use_backend(dgrad="fp8")
    def run(x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, weight, scale)

    (expected,) = torch.autograd.grad(run(x), x, grad)

    checkpoint(run, x, use_reentrant=use_reentrant).backward(grad)

    assert torch.equal(x.grad, expected)


def test_func_grad(device: str) -> None:
    weight, scale = layer(device=device)
    x = torch.randn(5, K, device=device)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, weight, scale).square().sum()

    with use_backend(dgrad="fp8"):
        got = torch.func.grad(loss)(x)
        trained = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(trained), trained)

    assert torch.equal(got, expected)
    (usual,) = torch.autograd.grad(loss(trained), trained)
    assert not torch.equal(got, usual)


def test_backward_honours_accuracy_and_batch_invariance(device: str, products: Products) -> None:
    weight, scale = oracle.make_weight(40, 272, BLOCK, device=device)
    x = torch.randn(66, 272, device=device, requires_grad=True)
    grad = torch.randn(66, 40, device=device)
    with use_backend(dgrad="fp8", accuracy="fast", batch_invariant=True):
        out = fp8_linear(x, weight, scale)
        (whole,) = torch.autograd.grad(out, x, grad)
        for m in (1, 17, 33):
            some = x[:m].detach().requires_grad_()
            (got,) = torch.autograd.grad(fp8_linear(some, weight, scale), some, grad[:m])
            assert torch.equal(got, whole[:m])
    backward = [problem for problem, _ in products if problem.gradient]
    assert len(backward) == 4
    for problem in backward:
        assert problem.batch_invariant
        assert problem.accuracy is Accuracy.FAST
    with (
        use_backend("eager", dgrad="fp8", batch_invariant=False),
        use_backend(batch_invariant=True),
        pytest.raises(BackendUnavailableError, match="batch_invariant"),
    ):
        fp8_linear(x, weight, scale)
