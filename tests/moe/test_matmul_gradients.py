"""Gradients of expert matmuls: against float64 on the dequantised weights, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fp8dispatch import FrozenWeightError, use_backend
from fp8dispatch.moe import gradient
from fp8dispatch.moe.execute import decoded_weights, route_of
from fp8dispatch.quantization.weight import dequantize_strip
from fp8dispatch.recipe import BLOCK_128, ROW, Recipe
from tests.moe.cases import RECIPES, WAYS, Call, make_call


def wanted(call: Call, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dX in float64, the mass that its rounding errors are relative to, and dBias."""
    weight = call.dequantized()
    x = call.arguments["x"]
    value = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    mass = value.clone()
    bias = torch.zeros(weight.shape[:2], dtype=torch.float64, device=x.device)
    for expert, source, target in call.reached():
        row = grad[target].double()
        value[source] += row @ weight[expert]
        mass[source] += row.abs() @ weight[expert].abs()
        bias[expert] += row
    return value, mass, bias


def assert_gradients(call: Call, got: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor) -> None:
    value, mass, expected_bias = wanted(call, grad)
    roundoff = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
    step = roundoff[grad.dtype] + roundoff[got.dtype]
    bound = 2.1 * step * mass + 1e-30
    worst = ((got.double() - value).abs() / bound).max().item()
    assert worst <= 1, f"dX is {worst:.2f} times the bound"
    torch.testing.assert_close(bias.double(), expected_bias, rtol=1e-5, atol=1e-5)


def backward(call: Call, grad: torch.Tensor, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, bias = (call.arguments[name].detach().requires_grad_() for name in ("x", "bias"))
    torch.autograd.backward(call.run(x=x, bias=bias, **more), grad)
    assert x.grad is not None
    assert bias.grad is not None
    return x.grad, bias.grad


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_in_plain_torch(way: str, recipe: Recipe) -> None:
    call = make_call(way, recipe, 5, 40, 70, 11, bias=torch.float32)
    grad = torch.randn(11, 40).bfloat16()

    got, bias = backward(call, grad)

    assert got.dtype == torch.bfloat16
    assert_gradients(call, got, bias, grad)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_by_the_kernels(way: str, recipe: Recipe) -> None:
    dtype = torch.float32 if recipe == ROW else torch.bfloat16
    call = make_call(way, recipe, 5, 40, 70, 11, bias=torch.float32, sentinels=0.3)
    grad = torch.randn(11, 40).to(dtype)
    arguments = call.arguments
    batched = way.startswith("batched")
    routing = route_of(
        arguments["x"].shape[0],
        5,
        arguments["expert_ids" if batched else "offsets"],
        arguments.get("gather"),
        arguments.get("scatter"),
        batched=batched,
    )
    weights = decoded_weights(arguments["weight"], arguments["weight_scale"], recipe)

    got = gradient.grad_input(grad, weights, routing, use_kernels=True)
    bias = gradient.grad_bias(grad, routing, torch.float32, use_kernels=True)

    assert_gradients(call, got, bias, grad)


@pytest.mark.parametrize("way", ["batched", "grouped"])
def test_plain_autograd_of_a_loop_gives_the_same(way: str) -> None:
    """Of the same layer in float32 without quantisation of the activations."""
    call = make_call(way, BLOCK_128, 4, 24, 40, 16, bias=torch.float32, x_dtype=torch.float32)
    grad = torch.randn(16, 24)
    weight = call.dequantized().float()
    x, bias = (call.arguments[name].detach().requires_grad_() for name in ("x", "bias"))
    loop = torch.zeros(16, 24)
    for expert, source, target in call.reached():
        loop[target] = x[source] @ weight[expert].t() + bias[expert]
    torch.autograd.backward(loop, grad)

    got, got_bias = backward(call, grad)

    torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_bias, bias.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_rows_without_an_expert_get_zero_gradients_whatever_arrives(way: str) -> None:
    call = make_call(way, ROW, 4, 8, 16, 12, bias=torch.float32, sentinels=0.5)
    grad = torch.randn(12, 8)
    reached = {target for _, _, target in call.reached()}
    others = [row for row in range(12) if row not in reached]
    grad[others] = torch.nan

    got, bias = backward(call, grad, out_dtype=torch.float32)

    assert others
    assert got.isfinite().all()
    assert bias.isfinite().all()


def test_all_rows_without_an_expert() -> None:
    call = make_call("batched", ROW, 4, 8, 16, 6, bias=torch.float32, sentinels=1.1)

    got, bias = backward(call, torch.randn(6, 8))

    assert not got.any()
    assert not bias.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_have_the_dtypes_of_their_tensors(dtype: torch.dtype) -> None:
    call = make_call("batched-gather", ROW, 4, 8, 16, 6, bias=dtype, x_dtype=dtype)

    got, bias = backward(call, torch.randn(6, 8), out_dtype=torch.float32)

    assert got.dtype == bias.dtype == dtype


def test_only_experts_with_rows_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call("batched", ROW, 64, 8, 16, 6, bias=torch.float32, sentinels=0.0)
    widened: list[tuple[int, ...]] = []

    def spy(data: torch.Tensor, *rest: Any) -> torch.Tensor:
        widened.append(tuple(data.shape))
        return dequantize_strip(data, *rest)

    monkeypatch.setattr("fp8dispatch.dequantized_grad.dequantize_strip", spy)
    backward(call, torch.randn(6, 8))

    assert widened == [(8, 16)] * len({expert for expert, _, _ in call.reached()})


@pytest.mark.parametrize("name", ["weight_scale", "activation_scale"])
def test_frozen_tensors_raise_in_backward(name: str) -> None:
    call = make_call("batched", ROW, 3, 8, 16, 6, static="each")
    frozen = call.arguments[name].detach().requires_grad_()

    out = call.run(**{name: frozen})

    with pytest.raises(FrozenWeightError, match=f"{name} requires grad"):
        torch.autograd.backward(out.sum())


def test_a_weight_that_is_a_parameter_raises_in_backward_only() -> None:
    call = make_call("batched", ROW, 3, 8, 16, 6)
    weight = torch.nn.Parameter(call.arguments["weight"])

    out = call.run(weight=weight)

    with pytest.raises(FrozenWeightError, match="weight requires grad"):
        torch.autograd.backward(out.sum())


def test_nothing_is_recorded_without_gradients() -> None:
    call = make_call("batched", ROW, 3, 8, 16, 6)
    assert call.run().grad_fn is None
    with torch.no_grad():
        assert call.run(x=call.arguments["x"].float().requires_grad_()).grad_fn is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    call = make_call("batched-gather", BLOCK_128, 3, 24, 40, 8, bias=torch.float32)
    grad = torch.randn(8, 24).bfloat16()
    expected, expected_bias = backward(call, grad)
    x, bias = (call.arguments[name].detach().requires_grad_() for name in ("x", "bias"))

    out = checkpoint(lambda x, bias: call.run(x=x, bias=bias), x, bias, use_reentrant=reentrant)
    torch.autograd.backward(out, grad)

    assert torch.equal(x.grad, expected)
    assert torch.equal(bias.grad, expected_bias)


def test_two_runs_give_the_same_bits() -> None:
    call = make_call("grouped-index", BLOCK_128, 4, 24, 40, 30, bias=torch.float32, sentinels=0.0)
    grad = torch.randn(30, 24).bfloat16()

    first, second = backward(call, grad), backward(call, grad)

    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused() -> None:
    call = make_call("batched", ROW, 3, 8, 16, 6, x_dtype=torch.float32)
    x = call.arguments["x"].requires_grad_()
    (grad,) = torch.autograd.grad(call.run().square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.backward(grad.sum())


def test_the_policy_of_the_forward_call_is_no_matter_of_the_backward() -> None:
    call = make_call("batched", ROW, 3, 8, 16, 4, bias=torch.float32)
    grad = torch.randn(4, 8).bfloat16()
    with use_backend("triton"):
        got, bias = backward(call, grad)

    assert_gradients(call, got, bias, grad)


def test_meta_gradients_have_their_shapes() -> None:
    call = make_call("batched", ROW, 3, 8, 16, 6, bias=torch.float32)
    moved = {
        name: value.to("meta")
        for name, value in call.arguments.items()
        if isinstance(value, torch.Tensor)
    }
    x, bias = (moved[name].requires_grad_() for name in ("x", "bias"))

    torch.autograd.backward(call.run(**moved).sum())
    assert x.grad is not None
    assert bias.grad is not None

    assert x.grad.shape == (6, 16)
    assert bias.grad.shape == (3, 8)
    assert x.grad.is_meta


def test_torch_func_grad() -> None:
    call = make_call("batched", ROW, 3, 8, 16, 6, x_dtype=torch.float32, bias=torch.float32)
    expected, _ = backward(call, torch.ones(6, 8))

    got = torch.func.grad(lambda x: call.run(x=x).sum())(call.arguments["x"])

    assert torch.equal(got, expected)
