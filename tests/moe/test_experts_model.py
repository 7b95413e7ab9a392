"""Experts inside a model: explained, warmed, compiled, checkpointed, trained around."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp8dispatch
from fp8dispatch import (
    BackendUnavailableError,
    ExpertActivation,
    FP8Experts,
    FP8Linear,
    FrozenWeightError,
    InvalidInputError,
    ShapeError,
    decide,
    prepare,
)
from fp8dispatch.moe import forward
from tests import oracle
from tests.moe import reference
from tests.oracle import RECIPES

if TYPE_CHECKING:
    from fp8dispatch.recipe import Recipe

E, INNER, H, TOP_K = 8, 40, 72, 2  # so many experts that one token is batched
SMALL = fp8dispatch.Recipe.parse("block", (32, 32))

every_route = pytest.mark.parametrize("route", ["batched", "grouped"])


def make_experts(recipe: Recipe | str = SMALL, *, bias: bool = False) -> FP8Experts:
    weights = {
        "gate_up_proj": torch.randn(E, 2 * INNER, H) * 0.2,
        "down_proj": torch.randn(E, H, INNER) * 0.2,
    }
    if bias:
        weights["gate_up_proj_bias"] = nn.Parameter(torch.randn(E, 2 * INNER))
        weights["down_proj_bias"] = nn.Parameter(torch.randn(E, H))
    return FP8Experts.from_weights(weights, recipe, top_k=TOP_K)


class Mixture(nn.Module):
    """A router and experts."""

    def __init__(self, experts: FP8Experts) -> None:
        super().__init__()
        self.router = nn.Linear(H, E)
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, -1)
        out: torch.Tensor = self.experts(x, ids, weights)
        return out


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "GROUPED_FROM", {"batched": 10**9, "grouped": 0}[route])


# Explained and warmed.


def test_a_model_is_explained_projection_by_projection() -> None:
    model = nn.ModuleDict({"up": nn.Linear(H, H), "mixture": Mixture(make_experts())})
    fp8dispatch.convert_model(model, "row", skip=["router"])

    few = fp8dispatch.explain(model, tokens=1)
    many = fp8dispatch.explain(model, tokens=4 * E)

    names = ["up", "mixture.experts.gate_up_proj", "mixture.experts.down_proj"]
    assert list(few) == list(many) == names
    for decisions, way in ((few, "batched"), (many, "grouped")):
        into, back = (decisions[name].problem for name in names[1:])
        assert (into.n, into.k, back.n, back.k) == (2 * INNER, H, H, INNER)
        assert way in str(into)
        assert way in str(back)
    assert few[names[1]].problem.m == TOP_K
    assert "gathers" in str(many[names[1]])
    assert "scatters" in str(many[names[2]])


def test_explain_says_what_a_call_then_does(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make_experts(bias=True)
    made: list[Any] = []
    original = decide.decide
    from fp8dispatch.moe import execute, matmul

    def watched(problem: Any, *rest: Any) -> Any:
        made.append(problem)
        return original(problem, *rest)

    monkeypatch.setattr(execute, "decide", watched)
    monkeypatch.setattr(matmul, "decide", watched)
    for tokens, way in ((1, "batched"), (40, "grouped")):
        x = torch.randn(tokens, H)
        ids, weights = reference.routed(tokens, 3, E)
        experts(x, ids, weights)
        called = made.copy()
        assert all(way in str(problem) for problem in called)
        made.clear()
        experts.explain(x, 3)
        assert made == called
        made.clear()


def test_a_split_projection_is_explained_once() -> None:
    tensors = {
        "gate_up_proj": torch.zeros(E, 2 * INNER, H).to(torch.float8_e4m3fn),
        "gate_up_proj_scale_inv": torch.ones(E, 2, 1),
        "down_proj": torch.zeros(E, H, INNER).to(torch.float8_e4m3fn),
        "down_proj_scale_inv": torch.ones(E),
    }

    decisions = fp8dispatch.explain(FP8Experts.from_tensors(tensors))

    assert list(decisions) == ["gate_up_proj", "down_proj"]
    assert decisions["gate_up_proj"].problem.n == INNER


def test_what_cannot_be_explained_is_refused() -> None:
    experts = make_experts()

    with pytest.raises(ShapeError, match="top_k"):
        experts.explain(torch.randn(3, H), 0)
    with pytest.raises(ShapeError, match="K=9"):
        experts.explain(torch.randn(3, 9))
    with pytest.raises(InvalidInputError, match="FP8Linear or FP8Experts layers"):
        fp8dispatch.explain(nn.ReLU())
    forced = FP8Experts(E, H, INNER, backend="cublaslt")
    with pytest.raises(BackendUnavailableError, match="cublaslt"):
        fp8dispatch.explain(forced)


def test_warm_experts_decide_and_check_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(FP8Linear(H, H), Mixture(make_experts()))
    counts = [1, 4 * E]

    linear, experts = fp8dispatch.warmup(model, counts, dtype=torch.float32)

    assert (linear.name, experts.name) == ("0", "1.experts")
    assert set(experts.backends) == set(counts)
    ways = [forward.way(count * TOP_K, E) for count in counts]
    assert ways == ["batched", "grouped"]
    assert experts.extra_bytes >= 4 * model[1].experts.down_proj_scale_inv.numel()
    monkeypatch.setattr(prepare, "_check_values", None)  # a check would now raise TypeError
    before = decide.stats()["cold_decisions"]
    for count in counts:
        model(torch.randn(count, H))
    assert decide.stats()["cold_decisions"] == before


# Gradients.


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@every_route
def test_gradients_are_those_of_plain_experts(
    recipe: Recipe, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dX, the routing weights' and the biases', against autograd through float64 experts over the
    same dequantised weights; the forward values differ by the quantised activations alone."""
    take(route, monkeypatch)
    module = make_experts(recipe, bias=True)
    plain = reference.of_module(module, recipe, quantize=False)
    assert plain.up_bias is not None
    assert plain.down_bias is not None
    ids, shares = reference.routed(20, TOP_K, E)
    ids[3, 1], ids[7] = E, -1
    x = torch.randn(20, H)
    grad = torch.randn(20, H)
    ours = [x.clone().requires_grad_(), shares.clone().requires_grad_()]
    wide = [x.double().requires_grad_(), shares.double().requires_grad_()]

    module(ours[0], ids, ours[1]).backward(grad)
    biases = [plain.up_bias.requires_grad_(), plain.down_bias.requires_grad_()]
    plain(wide[0], ids, wide[1]).backward(grad.double())

    got = [*ours, module.get_parameter("gate_up_proj_bias"), module.get_parameter("down_proj_bias")]
    for one, other, floor in zip(got, [*wide, *biases], [18, 18, 18, 90], strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype == one.dtype
        noise = (one.grad.double() - other.grad).norm() / other.grad.norm()
        assert -20 * torch.log10(noise) > floor
    assert not ours[0].grad[7].any()
    assert not ours[1].grad[3, 1].any()


@every_route
def test_input_gradients_of_a_linear_activation_are_exact(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing but weights between Y and X the rounding of activations has no part in dX."""
    take(route, monkeypatch)
    weights = {"up_proj": torch.randn(E, INNER, H), "down_proj": torch.randn(E, H, INNER)}
    module = FP8Experts.from_weights(
        weights, SMALL, activation=ExpertActivation("linear", gated=False)
    )
    ids, shares = reference.routed(12, 3, E)
    x = torch.randn(12, H, requires_grad=True)
    grad = torch.randn(12, H)

    module(x, ids, shares).backward(grad)

    wide = x.detach().double().requires_grad_()
    plain = reference.of_module(module, SMALL, lambda inner: inner, quantize=False)
    plain(wide, ids, shares.double()).backward(grad.double())
    assert x.grad is not None
    assert wide.grad is not None
    assert oracle.sqnr(x.grad, wide.grad).min() > 100


def test_the_weights_are_frozen() -> None:
    module = make_experts()
    module.down_proj.requires_grad_()
    ids, weights = reference.routed(3, 1, E)

    out = module(torch.randn(3, H), ids, weights)
    with pytest.raises(FrozenWeightError, match="frozen"):
        out.sum().backward()


@every_route
def test_checkpointing_gives_the_same_gradients(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(route, monkeypatch)
    model = Mixture(make_experts(bias=True))
    twin = copy.deepcopy(model)
    x = torch.randn(10, H, requires_grad=True)
    y = x.detach().clone().requires_grad_()

    out = model(x)
    out.square().sum().backward()
    again = checkpoint(twin, y, use_reentrant=False)
    again.square().sum().backward()

    assert torch.equal(again, out)
    assert torch.equal(y.grad, x.grad)  # type: ignore[arg-type]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    assert model.router.weight.grad is not None


# Compiled.


@every_route
def test_compiled_in_one_graph(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(route, monkeypatch)
    model = Mixture(make_experts(bias=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)

    for tokens in (6, 9):
        x = torch.randn(tokens, H, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        out, expected = compiled(x), model(y)
        torch.testing.assert_close(out, expected)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        (wanted,) = torch.autograd.grad(expected.square().sum(), y)
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


def test_another_number_of_tokens_does_not_recompile_on_the_same_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take("grouped", monkeypatch)
    model = Mixture(make_experts())
    graphs: list[Any] = []

    def counting(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module

    compiled = torch.compile(model, fullgraph=True, backend=counting, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 8, 31, 64):
            x = torch.randn(tokens, H)
            torch.testing.assert_close(compiled(x), model(x))

    assert len(graphs) == 1


@every_route
def test_exported_with_any_number_of_tokens(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph holds one of the two ways, as the example took it, and no number of tokens."""
    take(route, monkeypatch)
    model = Mixture(make_experts(bias=True))
    dynamic = ({0: torch.export.Dim.DYNAMIC},)

    program = torch.export.export(model, (torch.randn(6, H),), dynamic_shapes=dynamic)

    for tokens in (2, 6, 33):
        x = torch.randn(tokens, H)
        torch.testing.assert_close(program.module()(x), model(x))
