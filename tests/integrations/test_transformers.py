"""Mixture-of-experts models of Transformers on this library, against the unquantised model."""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.14")

from transformers.integrations import finegrained_fp8 as theirs

import fp8dispatch
from fp8dispatch import (
    AmbiguousRecipeError,
    BackendUnavailableError,
    DTypeError,
    FP8Experts,
    FP8Linear,
    InvalidInputError,
)
from fp8dispatch.integrations import transformers as integration
from fp8dispatch.moe import forward
from tests import oracle
from tests.integrations import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

families = pytest.mark.parametrize("family", tiny.FAMILIES)


@pytest.fixture(autouse=True)
def plugged_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The name is registered, and what Transformers knew before comes back."""
    known = theirs.ALL_FP8_EXPERTS_FUNCTIONS._global_mapping
    before = dict(known)
    for held in ("_FINEGRAINED_FP8", "_load_finegrained_fp8_kernel"):  # as this release has it
        if hasattr(theirs, held):
            monkeypatch.setattr(theirs, held, getattr(theirs, held))
    integration.register_experts()
    yield
    known.clear()
    known.update(before)


def tokens() -> torch.Tensor:
    return torch.randint(64, (3, 11))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


def route_of(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Experts that the routers choose, one tensor for each mixture."""
    chosen: list[torch.Tensor] = []
    hooks = [
        module.experts.register_forward_pre_hook(lambda _m, given: chosen.append(given[1]))
        for module in model.modules()
        if hasattr(module, "experts")
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return chosen


@families
@pytest.mark.parametrize("route", ["batched", "grouped"])
def test_a_model_with_quantised_experts(
    family: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "GROUPED_FROM", {"batched": 10**9, "grouped": 0}[route])
    model = tiny.make(family)
    ids = tokens()
    expected = model(ids).logits
    without = copy.deepcopy(model)
    nn.init.zeros_(without.model.layers[1].mlp.experts.down_proj)

    twin = tiny.quantized(model)
    twin.set_experts_implementation("fp8dispatch")
    logits = twin(ids).logits

    # Only the experts of the last layer are quantised, so that the routers choose alike.
    assert isinstance(twin.model.layers[1].mlp.experts, theirs.FP8Experts)
    assert sum(isinstance(module, theirs.FP8Linear) for module in twin.modules()) == 0
    matter = error(without(ids).logits, expected)
    assert matter > 0.3
    assert error(logits, expected) < 0.1 * matter


@families
@pytest.mark.parametrize("kind", ["per tensor", "e8m0"])
def test_other_recipes(family: str, kind: str) -> None:
    model = tiny.make(family)
    ids = tokens()
    twin = (
        tiny.quantized(model, None)
        if kind == "per tensor"
        else tiny.quantized(model, scale_fmt="ue8m0")
    )
    twin.set_experts_implementation("fp8dispatch")

    assert error(twin(ids).logits, model(ids).logits) < 0.08


@families
def test_transformers_own_paths_run_on_the_kernel_that_we_provide(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8Linear, batched_mm and grouped_mm, unchanged, over our names of the hub kernel."""
    monkeypatch.setenv("TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR", "1")
    integration.provide_kernel()
    model = tiny.make(family)
    ids = tokens()
    expected = model(ids).logits
    twin = tiny.quantized(model, with_linears=True)
    assert any(type(module) is theirs.FP8Linear for module in twin.modules())

    logits = {}
    for name in ("batched_mm", "grouped_mm", "fp8dispatch"):
        twin.set_experts_implementation(name)
        logits[name] = twin(ids).logits

    torch.testing.assert_close(logits["batched_mm"], logits["grouped_mm"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits["fp8dispatch"], logits["grouped_mm"], rtol=1e-3, atol=1e-3)
    same = [
        (a.sort(-1).values == b.sort(-1).values).all(-1)
        for a, b in zip(route_of(model, ids), route_of(twin, ids), strict=True)
    ]
    alike = torch.stack(same).all(0).view(ids.shape)
    assert alike.float().mean() > 0.5
    # Tokens whose routers chose otherwise went through other experts.
    assert error(logits["fp8dispatch"][alike], expected[alike]) < 0.25


def test_the_kernel_is_provided_where_the_loader_caches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Transformers before 5.20 does."""
    monkeypatch.delattr(theirs, "_FINEGRAINED_FP8", raising=False)
    monkeypatch.setattr(theirs, "_load_finegrained_fp8_kernel", lambda: None)

    integration.provide_kernel()

    kernel = theirs._load_finegrained_fp8_kernel()
    assert isinstance(kernel, theirs.FineGrainedFP8)
    assert kernel.grouped_matmul is fp8dispatch.integrations.finegrained_fp8.matmul_grouped


@families
def test_convert_model(family: str) -> None:
    model = tiny.make(family)
    ids = tokens()
    expected = model(ids).logits
    before = model.model.layers[1].mlp.experts
    weights = sum(p.nbytes for n, p in before.named_parameters())

    twin = copy.deepcopy(model)
    linear_only = fp8dispatch.convert_model(
        copy.deepcopy(model), "block", block_size=tiny.BLOCK, skip=["lm_head", "experts"]
    )
    report = fp8dispatch.convert_model(twin, "block", block_size=tiny.BLOCK)

    experts = twin.model.layers[1].mlp.experts
    assert isinstance(experts, FP8Experts)
    assert isinstance(twin.model.layers[1].self_attn.o_proj, FP8Linear)
    assert "model.layers.1.mlp.experts" in report.converted
    assert ("model.layers.1.mlp.experts", "skip='experts'") in linear_only.skipped
    assert report.bytes_before - linear_only.bytes_before == weights
    assert report.bytes_after - linear_only.bytes_after == sum(
        tensor.nbytes for tensor in experts.state_dict().values()
    )
    assert experts.top_k == tiny.TOP_K
    assert experts.activation == fp8dispatch.ExpertActivation("silu")
    alike = (
        route_of(model, ids)[-1].sort(-1).values == route_of(twin, ids)[-1].sort(-1).values
    ).all(-1)
    assert error(twin(ids).logits.flatten(0, 1)[alike], expected.flatten(0, 1)[alike]) < 0.25


@families
def test_one_lora_step(family: str) -> None:
    """Adapters below the quantised experts and the router get the unquantised model's gradients."""
    model = tiny.make(family)
    ids = tokens()
    twin = tiny.quantized(model)
    twin.set_experts_implementation("fp8dispatch")
    ours = copy.deepcopy(model)
    fp8dispatch.convert_model(ours, "block", block_size=tiny.BLOCK, skip=tiny.linears(ours))
    assert isinstance(ours.model.layers[1].mlp.experts, FP8Experts)

    results = []
    torch.manual_seed(1)
    initial = torch.randn(4, tiny.HIDDEN) / 8
    for one in (model, twin, ours):
        one.requires_grad_(False)
        gate = one.model.layers[1].mlp.gate.weight.requires_grad_()
        adapter = Adapter(one.model.layers[1].self_attn.o_proj, initial)
        one.model.layers[1].self_attn.o_proj = adapter
        trained = [adapter.a, adapter.b, gate]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        before = one(ids, labels=ids).loss
        before.backward()
        gradients = [parameter.grad.clone() for parameter in trained]
        optimizer.step()
        results.append((before.item(), one(ids, labels=ids).loss.item(), gradients))

    (before, after, expected), *others = results
    assert after < before - 0.01
    for quantised_before, quantised_after, gradients in others:
        assert abs(quantised_before - before) < 0.05
        assert abs(quantised_after - after) < 0.05
        for got, wanted in zip(gradients[1:], expected[1:], strict=True):
            assert error(got, wanted) < 0.15


class Adapter(nn.Module):
    """A frozen linear plus a trained update of rank 4."""

    def __init__(self, base: nn.Module, initial: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        columns = base.in_features
        assert isinstance(columns, int)
        self.a = nn.Parameter(initial.repeat(1, -(-columns // initial.shape[1]))[:, :columns])
        self.b = nn.Parameter(torch.zeros(tiny.HIDDEN, initial.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + x @ self.a.t() @ self.b.t()
        return out


def experts_module(**options: Any) -> Any:
    """One of Transformers' FP8 experts modules, filled."""
    model = tiny.make("qwen3-moe", 1)
    return tiny.quantized(model, **options).model.layers[0].mlp.experts


def call(experts: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    count = 5
    ids = torch.randint(tiny.EXPERTS, (count, 2)) if ids is None else ids
    return integration.run_experts(
        experts, torch.randn(count, tiny.HIDDEN), ids, torch.rand(count, 2)
    )


def test_static_activations() -> None:
    experts = experts_module()
    experts.activation_scheme = "static"
    experts.gate_up_proj_activation_scale = nn.Parameter(torch.full((tiny.EXPERTS,), 0.01))
    experts.down_proj_activation_scale = nn.Parameter(torch.full((tiny.EXPERTS,), 0.02))
    x = torch.randn(5, tiny.HIDDEN)
    ids = torch.randint(tiny.EXPERTS, (5, 2))
    weights = torch.rand(5, 2)

    static = integration.run_experts(experts, x, ids, weights)

    names = [name for name, p in experts.named_parameters() if p is not None]
    module = FP8Experts.from_tensors(
        {name: getattr(experts, name) for name in names}, block_size=tiny.BLOCK, split_scales=False
    )
    assert torch.equal(static, module(x, ids, weights))
    experts.activation_scheme = "dynamic"
    assert not torch.equal(static, integration.run_experts(experts, x, ids, weights))


def test_tokens_of_other_ranks() -> None:
    experts = experts_module()
    experts._is_expert_parallel = True
    ids = torch.randint(tiny.EXPERTS, (5, 2))
    ids[2] = tiny.EXPERTS
    ids[3, 0] = tiny.EXPERTS

    out = call(experts, ids)

    assert not out[2].any()
    assert bool(out[[0, 1, 3, 4]].any(-1).all())
    assert bool(out.isfinite().all())


def test_the_models_own_gate_is_used() -> None:
    experts = experts_module()
    x, ids, weights = torch.randn(5, tiny.HIDDEN) * 4, torch.randint(8, (5, 2)), torch.rand(5, 2)
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[1].clamp(-0.5, 0.5)

    out = integration.run_experts(experts, x, ids, weights)

    recipe = fp8dispatch.Recipe.parse("block", tiny.BLOCK)
    total = torch.zeros(5, tiny.HIDDEN, dtype=torch.float64)
    for token in range(5):
        for slot in range(2):
            one = int(ids[token, slot])
            up = oracle.dequantized_weight(
                experts.gate_up_proj[one].detach(),
                experts.gate_up_proj_scale_inv[one].detach(),
                recipe,
            )
            down = oracle.dequantized_weight(
                experts.down_proj[one].detach(), experts.down_proj_scale_inv[one].detach(), recipe
            )
            row = oracle.dequantized_activations(x[token : token + 1], recipe)
            inner = (row @ up.t()).chunk(2, -1)[1].clamp(-0.5, 0.5)
            out_row = oracle.dequantized_activations(inner.float(), recipe) @ down.t()
            total[token] += weights[token, slot].double() * out_row[0]
    assert oracle.sqnr(out, total).min() > 60


def test_a_scale_of_two_readings_is_asked_for() -> None:
    experts = FP8Like(48)

    with pytest.raises(AmbiguousRecipeError, match="split_scales=True"):
        call(experts)
    experts.split_scales = True
    split = integration.run_experts(experts, *experts.example())
    experts.split_scales = False
    assert not torch.allclose(split, integration.run_experts(experts, *experts.example()))


class FP8Like:
    """The attributes of Transformers' FP8 experts that are read, where 2 I and 64 do not divide."""

    has_gate = True
    activation_scheme = "dynamic"
    block_size = (64, 64)

    def __init__(self, inner: int) -> None:
        gate_up = torch.randn(tiny.EXPERTS, 2 * inner, tiny.HIDDEN)
        self.gate_up_proj, scale = fp8dispatch.quantize_experts(
            gate_up, "block", block_size=(64, 64)
        )
        self.gate_up_proj_scale_inv = scale * torch.tensor([1.0, 3.0]).view(1, 2, 1)
        self.down_proj, self.down_proj_scale_inv = fp8dispatch.quantize_experts(
            torch.randn(tiny.EXPERTS, tiny.HIDDEN, inner), "block", block_size=(64, 64)
        )

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def example(self) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        return torch.randn(4, tiny.HIDDEN), torch.randint(8, (4, 2)), torch.rand(4, 2)


def test_what_is_refused() -> None:
    experts = experts_module()
    weight = experts.down_proj

    experts.down_proj = nn.Parameter(weight.view(torch.int8), requires_grad=False)
    with pytest.raises(DTypeError, match="packed FP4"):
        call(experts)
    experts.down_proj = nn.Parameter(weight.float(), requires_grad=False)
    with pytest.raises(DTypeError, match=r"down_proj must be FP8.*convert_model"):
        call(experts)
    experts.has_post_expert_norm = True
    with pytest.raises(InvalidInputError, match="norm behind each"):
        call(experts)


def test_the_name_is_registered_once_and_not_taken_from_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    integration.register_experts()
    integration.register_experts("my-experts")
    assert theirs.ALL_FP8_EXPERTS_FUNCTIONS["my-experts"] is integration.run_experts

    with pytest.raises(InvalidInputError, match="name must be free, found 'grouped_mm'"):
        integration.register_experts("grouped_mm")
    with pytest.raises(ValueError, match="fp8dispatcher"):
        tiny.make("qwen3-moe", 1).set_experts_implementation("fp8dispatcher")

    monkeypatch.delattr(theirs, "ALL_FP8_EXPERTS_FUNCTIONS")
    monkeypatch.setattr(theirs, "FineGrainedFP8", dataclasses.make_dataclass("Other", ["matmul"]))
    with pytest.raises(BackendUnavailableError, match=r"ALL_FP8_EXPERTS_FUNCTIONS.*transformers 5"):
        integration.register_experts()
    with pytest.raises(BackendUnavailableError, match=r"FineGrainedFP8.*transformers 5"):
        integration.provide_kernel()
    monkeypatch.setitem(sys.modules, theirs.__name__, None)
    with pytest.raises(BackendUnavailableError, match="install transformers 5"):
        integration.register_experts()
