"""`weight_only`: unquantised activations over FP8 weights, where it is named and nowhere else."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import explain, fp8_linear, registry, routes
from fp8dispatch.backends.compute import triton as compute
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.eager import Eager
from fp8dispatch.backends.triton import Triton
from fp8dispatch.backends.weight_only import BACKEND, WeightOnly
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.machine import Machine
from fp8dispatch.policy import Policy
from fp8dispatch.probes import linear_numerics
from fp8dispatch.probes.numerics import run_canary
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import BLOCK_128, ROW
from fp8dispatch.router import Decision, Standing, select
from tests import oracle
from tests.backends.cases import A100, B200, CPU, H200, L40S, MI300X, RTX_5090, blocks, told

N, K = 40, 150
REASON = (
    'needs to be named (backend="weight_only"), since it leaves activations unquantised, which '
    "gives other numbers than FP8 activations, at the speed of 16-bit multiplication, found a call "
    "that does not name it"
)


@pytest.fixture(autouse=True)
def small_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the kernels run in an interpreter, where the canary would take a minute."""
    # None is a CPU's capability: known to be right there, it is tested in this process.
    monkeypatch.setattr(Triton, "verified_capabilities", (*Triton.verified_capabilities, None))
    monkeypatch.setattr(linear_numerics, "_ROWS", (12, 10))
    monkeypatch.setattr(linear_numerics, "_COLUMNS", (48,))
    monkeypatch.setattr(linear_numerics, "_DEPTHS", (160,))


@pytest.mark.parametrize("recipe", [BLOCK_128, ROW, oracle.RECIPES["block-1x32"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=oracle.name_of)
def test_activations_are_taken_as_they_are(recipe: Any, dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    x = torch.randn(K, 2, 5, device=device).to(dtype).movedim(0, -1).requires_grad_()
    bias = torch.randn(N, device=device)

    out = fp8_linear(
        x, weight, scale, bias, block_size=recipe.block_size, out_dtype=dtype, backend="weight_only"
    )
    grad = torch.randn(out.shape, device=device).to(dtype)
    (got,) = torch.autograd.grad(out, x, grad)

    wide = oracle.dequantized_weight(weight, scale, recipe)
    oracle.assert_matches(out, oracle.truth(x.detach().double().reshape(-1, K), wide, bias))
    oracle.assert_gradient(got, grad, wide)


def test_quantised_activations_are_multiplied_as_triton_does(device: str) -> None:
    weight, scale = oracle.make_weight(N, K, BLOCK_128, device=device)
    x = QuantizedActivation.from_tensor(torch.randn(5, K, device=device), group_size=128)

    outputs = [
        fp8dispatch.fp8_linear_quantized(x, weight, scale, backend=name)
        for name in ("weight_only", "triton")
    ]

    assert torch.equal(*outputs)


def test_a_row_is_summed_alike_in_every_batch(device: str) -> None:
    weight, scale = oracle.make_weight(N, K, ROW, device=device)
    x = torch.randn(66, K, device=device, dtype=torch.bfloat16)

    with fp8dispatch.use_backend("weight_only", batch_invariant=True):
        whole = fp8_linear(x, weight, scale)
        for m in (1, 17):
            assert torch.equal(fp8_linear(x[:m], weight, scale), whole[:m])


def route(allowed: Policy, machine: Machine = H200, **changes: Any) -> Decision:
    """The decision of the real backends where every one of them computes right numbers."""
    problem = blocks(**changes)
    order, source = routes.order_for(problem, machine, registry.NAMES)
    judge = lambda name: Standing("right", "as tested", usable=True)  # noqa: E731
    return select(problem, machine, allowed, order, registry.load, judge, source)


@pytest.mark.parametrize("machine", [H200, A100, L40S, B200, RTX_5090, CPU], ids=str)
def test_nobody_gets_it_unasked(machine: Machine) -> None:
    decision = route(Policy(), machine)

    assert decision.backend != "weight_only"
    assert "weight_only" not in decision.others
    assert str(dict(decision.refusals)["weight_only"][0]) == REASON
    assert f"  weight_only {REASON}" in str(decision).splitlines()


def test_no_exclusion_gets_to_it() -> None:
    # All of these run the call but the one that has expert matmuls alone.
    unnamed = [name for name in registry.NAMES if not registry.load(name).opt_in]
    others = [name for name in unnamed if name != "cutlass"]
    for count in (1, len(others) - 1):
        for excluded in itertools.combinations(others, count):
            assert route(Policy(excluded=excluded)).backend != "weight_only"
    with pytest.raises(BackendUnavailableError, match="weight_only needs to be named"):
        route(Policy(excluded=tuple(others), source="use_backend"))


@pytest.mark.parametrize("machine", [H200, A100, L40S, B200, RTX_5090], ids=str)
@pytest.mark.parametrize("only", [("weight_only",), ("deepgemm", "weight_only", "triton")], ids=len)
def test_a_statement_that_names_it_gets_it(only: tuple[str, ...], machine: Machine) -> None:
    """On GPUs without FP8 as well; DeepGEMM takes no output in fp16."""
    assert route(Policy(only), machine, out_dtype="float16").backend == "weight_only"


def test_what_it_refuses_is_told_beside_its_name() -> None:
    static = told(BACKEND.refuse_problem(blocks(static_activation=True), H200))
    assert static == [
        "static: needs activations without a scale, since it does not quantise them, found one "
        "static activation scale"
    ]
    assert [refusal.code for refusal in BACKEND.refuse_machine(MI300X)] == ["rocm"]
    codes = [one.code for one in dict(route(Policy(), MI300X).refusals)["weight_only"]]
    assert codes == ["opt-in", "rocm"]


def test_explain_names_it_and_the_automatic_choice_refuses_it() -> None:
    weight, scale = oracle.make_weight(N, K, ROW)
    x = torch.randn(3, K)

    assert explain(x, weight, scale, backend="weight_only").backend == "weight_only"
    assert explain(x, weight, scale).backend == "eager"


def test_other_numbers_must_be_opted_into() -> None:
    with pytest.raises(TypeError, match=r"Unsafe needs opt_in .* quantizes_activations=False"):
        type("Unsafe", (Eager,), {"quantizes_activations": False})


def test_the_canary_wants_activations_as_they_are(device: str) -> None:
    """Right as it is; wrong once it quantises, though both entries still multiply rightly."""

    class Quantizing(WeightOnly):
        linear = Triton.linear
        settled = WeightOnly.settled

    result = run_canary(BACKEND, torch.device(device), ROW)
    assert result.right, result.reason
    result = run_canary(Quantizing(), torch.device(device), ROW)
    assert not result.right
    assert "linear with" in result.reason


def test_calls_that_come_again_are_not_those_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready launches of `triton` quantise activations; an H200 took them from here, once."""
    problem = blocks(m=16, n=256, k=512)
    operands = oracle.make_weight(256, 512, BLOCK_128)
    weight = Weight(operands[0], operands[1], BLOCK_128, operands[1])
    monkeypatch.setattr(compute, "DIRECT_CAPABILITIES", ((9, 0),))
    monkeypatch.setattr(compute, "device_limits", lambda device: SimpleNamespace(capability=(9, 0)))
    monkeypatch.setattr(compute, "Settled", lambda *arguments: arguments)  # it allocates on the GPU
    gpu = torch.device("cuda", 0)

    assert registry.load("triton").settled(weight, None, problem, gpu) is not None
    assert BACKEND.settled(weight, None, problem, gpu) is None


def test_a_linear_of_its_own_needs_a_settled_of_its_own() -> None:
    with pytest.raises(TypeError, match="needs a settled\\(\\) of its own beside its linear"):

        class Other(Triton):
            name = "other"
            linear = Triton.linear
