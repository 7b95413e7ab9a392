"""FP8 dgrad of expert matmuls: against float64 on quantised dY, row by row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fp8dispatch import (
    BackendUnavailableError,
    ConfigurationError,
    FP8Experts,
    explain_experts,
    graph_policy,
    policy,
    prepare,
    use_backend,
    warmup,
)
from fp8dispatch.problem import Dgrad
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Recipe
from tests import fp8_gradients, oracle
from tests.moe.cases import RECIPES, WAYS, Call, make_call
from tests.test_ops import bytes_compare  # noqa: F401  # a fixture

TAKEN = {name: recipe for name, recipe in RECIPES.items() if name != "1x32"}


def wanted(call: Call, grad: torch.Tensor) -> oracle.Truth:
    """dX [T, K] in float64, each use of a row of X by itself."""
    weight, scale = call.arguments["weight"], call.arguments["weight_scale"]
    value = torch.zeros(call.arguments["x"].shape, dtype=torch.float64, device=grad.device)
    mass = value.clone()
    for expert, source, target in call.reached():
        row = grad[target : target + 1]
        one = fp8_gradients.truth(row, weight[expert], scale[expert], call.recipe)
        value[source] += one.value[0]
        mass[source] += one.mass[0]
    return oracle.Truth(value, mass)


def backward(call: Call, grad: torch.Tensor, **more: Any) -> torch.Tensor:
    x = call.arguments["x"].detach().requires_grad_()
    with use_backend(dgrad="fp8"):
        out = call.run(x=x, **more)
    return torch.autograd.grad(out, x, grad.to(out))[0]


@pytest.mark.parametrize("recipe", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("way", WAYS)
def test_numbers_in_plain_torch(way: str, recipe: Recipe, device: str) -> None:
    call = make_call(
        way, recipe, 5, 40, 70, 23, sentinels=0.3, x_dtype=torch.float32, device=device
    )
    grad = torch.randn(23, 40, device=device)

    got = backward(call, grad, backend="eager")

    assert (got.shape, got.dtype) == (call.arguments["x"].shape, torch.float32)
    oracle.assert_matches(got, wanted(call, grad))


@pytest.mark.parametrize("recipe", ["tensor", "row", "128x128", "7x20"])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_by_the_kernels(way: str, recipe: str, device: str) -> None:
    call = make_call(
        way, RECIPES[recipe], 4, 24, 40, 11, sentinels=0.3, x_dtype=torch.float32, device=device
    )
    grad = torch.randn(11, 24, device=device)

    got = backward(call, grad, backend="triton")

    oracle.assert_matches(got, wanted(call, grad))


@pytest.mark.parametrize("recipe", TAKEN.values(), ids=TAKEN)
def test_sixteen_bits_and_other_strides(recipe: Recipe, device: str) -> None:
    call = make_call("grouped", recipe, 5, 40, 70, 23, device=device)
    grad = torch.randn(40, 23, device=device).bfloat16().t()
    turned = call.arguments["weight"].transpose(1, 2).contiguous().transpose(1, 2)

    for weight in (call.arguments["weight"], turned):
        got = backward(call, grad, weight=weight)
        assert got.dtype == torch.bfloat16
        oracle.assert_matches(got, wanted(call, grad))


@pytest.mark.parametrize("recipe", [TENSOR, ROW, BLOCK_128], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_rows_without_an_expert_get_zeros_whatever_arrives(
    way: str, recipe: Recipe, device: str
) -> None:
    call = make_call(way, recipe, 4, 8, 16, 12, sentinels=0.5, x_dtype=torch.float32, device=device)
    grad = torch.randn(12, 8, device=device)
    reached = {target for _, _, target in call.reached()}
    others = [row for row in range(12) if row not in reached]
    grad[others] = torch.nan

    got = backward(call, grad)

    assert others
    oracle.assert_matches(got, wanted(call, grad), min_sqnr=0)


@pytest.mark.parametrize("way", WAYS)
def test_no_rows(way: str, device: str) -> None:
    call = make_call(way, ROW, 4, 8, 16, 0, x_dtype=torch.float32, device=device)
    got = backward(call, torch.zeros(0, 8, device=device))
    assert got.shape == call.arguments["x"].shape
    assert not got.any()


def test_groups_are_refused_before_the_forward_pass_runs(device: str) -> None:
    call = make_call("batched", RECIPES["1x32"], 4, 8, 64, 6, device=device)
    x = call.arguments["x"].detach().requires_grad_()
    with use_backend(dgrad="fp8"):
        for trained in (x, x.detach().to("meta").requires_grad_()):
            tensors = {
                name: value.to(trained.device)
                for name, value in call.arguments.items()
                if isinstance(value, torch.Tensor)
            }
            with pytest.raises(BackendUnavailableError, match="found groups"):
                call.run(**{**tensors, "x": trained})
        call.run()  # no gradient of x is recorded
        with torch.no_grad():
            call.run(x=x)


def test_the_transposed_weights_are_made_once(device: str) -> None:
    call = make_call("grouped", BLOCK_128, 4, 24, 40, 11, device=device)
    weight = call.arguments["weight"]
    grad = torch.randn(11, 24, device=device)
    backward(call, grad, backend="eager")
    assert prepare.prepared_bytes(weight) == 0, "plain torch reads any strides"

    first = backward(call, grad, backend="triton")

    assert prepare.prepared_bytes(weight) == weight.nbytes
    assert torch.equal(backward(call, grad, backend="triton"), first)
    assert prepare.prepared_bytes(weight) == weight.nbytes


def test_explanations(device: str) -> None:
    call = make_call("grouped", BLOCK_128, 4, 24, 40, 11, device=device)
    x, weight, scale = (call.arguments[name] for name in ("x", "weight", "weight_scale"))

    def explain(**more: Any) -> Any:
        return explain_experts(x, weight, scale, batched=False, block_size=(128, 128), **more)

    assert explain().gradient is None
    assert "through the dequantised weights" in explain(dgrad=True).gradient
    with use_backend(dgrad="fp8"):
        product = explain(dgrad=True, scatters=True).dgrad
    assert product is not None
    assert (product.problem.n, product.problem.k, product.problem.experts) == (40, 24, 4)
    assert product.problem.gradient
    assert product.problem.gathers
    assert not product.problem.scatters


@pytest.mark.parametrize("recipe", [ROW, BLOCK_128], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_compiled_as_it_is_run(way: str, recipe: Recipe) -> None:
    torch._dynamo.reset()
    call = make_call(way, recipe, 4, 24, 40, 8, sentinels=0.3)
    grad = torch.randn(8, 24).bfloat16()
    x = call.arguments["x"].detach().requires_grad_()
    run = torch.compile(lambda x: call.run(x=x), backend="aot_eager", fullgraph=True)
    with use_backend(dgrad="fp8"):
        out = run(x)
    with ThreadPoolExecutor(1) as other:  # as backward on a GPU, where no statement is heard
        (got,) = other.submit(torch.autograd.grad, out, x, grad).result()

    assert torch.equal(got, backward(call, grad))
    assert not torch.equal(got, torch.autograd.grad(run(x), x, grad)[0])
    torch._dynamo.reset()


@pytest.mark.usefixtures("bytes_compare")
@pytest.mark.parametrize("way", ["batched-gather", "grouped-index"])
def test_opcheck(way: str) -> None:
    call = make_call(way, BLOCK_128, 4, 24, 40, 8)
    given = call.arguments
    batched = way.startswith("batched")
    index = given["expert_ids" if batched else "offsets"]
    places = given.get("gather"), given.get("scatter")
    text = graph_policy.encode(policy.Policy(dgrad=Dgrad.FP8))
    x = given["x"].detach().requires_grad_()
    operators = torch.ops.fp8dispatch
    weights = given["weight"], given["weight_scale"]
    with use_backend(dgrad="fp8"):
        torch.library.opcheck(
            operators.experts.default,
            (x, *weights, index, None, None, *places, batched, 128, 128, torch.bfloat16, "",
             False, text),
        )  # fmt: skip
    grad = torch.randn(8, 24).bfloat16()
    torch.library.opcheck(
        operators.experts_grad_input.default,
        (grad, *weights, index, *places, batched, x.shape[0], 128, 128, torch.bfloat16, text),
    )


def test_a_layer_of_experts(device: str) -> None:
    experts = FP8Experts.from_weights(
        {
            "gate_up_proj": torch.randn(4, 48, 40, device=device) * 0.1,
            "down_proj": torch.randn(4, 40, 24, device=device) * 0.1,
        },
        "block",
    )
    x = torch.randn(9, 40, device=device, requires_grad=True)
    weights, ids = torch.rand(9, 4, device=device).topk(2, -1)

    def gradient(way: str) -> torch.Tensor:
        with use_backend(dgrad=way):
            out = experts(x, ids, weights)
        return torch.autograd.grad(out.sum(), x)[0]

    (plain,) = warmup(experts, [3])  # first: some backends keep a transposed weight from backward
    fp8, usual = gradient("fp8"), gradient("dequantized")

    assert not torch.equal(fp8, usual)
    ratio = oracle.sqnr(fp8.reshape(1, -1), usual.reshape(1, -1)).item()
    assert ratio > 24, "two products, each with the noise of a quantised dY"
    with use_backend(dgrad="fp8"):
        explained = experts.explain(x, 2)
    assert [one.dgrad is not None for one in explained.values()] == [True, True]
    assert [one.gradient for one in experts.explain(x.detach(), 2).values()] == [None, None]
    with use_backend("triton", dgrad="fp8"):
        (trained,) = warmup(experts, [3])
    kept = experts.gate_up_proj.numel() + experts.down_proj.numel()
    assert trained.extra_bytes - plain.extra_bytes >= kept


def test_the_operator_refuses_what_the_call_refuses() -> None:
    call = make_call("batched", RECIPES["1x32"], 4, 8, 64, 6)
    given = call.arguments
    x = given["x"].detach().requires_grad_()
    arguments = (
        x, given["weight"], given["weight_scale"], given["expert_ids"], None, None, None, None,
        True, 1, 32, torch.bfloat16, "", False,
    )  # fmt: skip
    text = graph_policy.encode(policy.Policy(dgrad=Dgrad.FP8))
    operator = torch.ops.fp8dispatch.experts
    with use_backend(dgrad="fp8"), pytest.raises(BackendUnavailableError, match="found groups"):
        operator(*arguments, text)
    with pytest.raises(ConfigurationError, match="is stated now"):
        operator(*arguments, text)
    operator(*arguments)
