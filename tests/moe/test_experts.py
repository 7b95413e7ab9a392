"""`FP8Experts`: its numbers against plain experts in float64, its layouts, and what it refuses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch import (
    AmbiguousRecipeError,
    FP8Experts,
)
from fp8dispatch.moe import forward
from tests import oracle
from tests.moe import reference
from tests.moe.experts_cases import (
    BLOCK,
    E,
    H,
    every_recipe,
    every_route,
    make_module,
    make_weights,
    take,
)

if TYPE_CHECKING:
    from fp8dispatch.recipe import Recipe


@every_recipe
@every_route
def test_numbers(recipe: Recipe, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(route, monkeypatch)
    module = make_module(recipe)
    x = torch.randn(9, H)
    ids, weights = reference.routed(9, 3, E)

    out = module(x, ids, weights)

    expected = reference.of_module(module, recipe, quantize=True)(x.double(), ids, weights.double())
    assert oracle.sqnr(out, expected).min() > 100  # a code that rounds the other way gives 60
    rough = reference.of_module(module, recipe, quantize=False)(x.double(), ids, weights.double())
    assert 18 < oracle.sqnr(out, rough).min() < 40  # the price of 8-bit activations


@every_route
@pytest.mark.parametrize("layout", ["fused", "apart", "plain"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_layouts_with_bias(
    layout: str, static: bool, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(route, monkeypatch)
    weights = make_weights(layout, bias=True, static=static)
    if static and layout == "apart":  # what enters both halves is quantised with one scale
        weights["up_proj_activation_scale"] = weights["gate_proj_activation_scale"]
    module = FP8Experts.from_weights(weights)
    x = torch.randn(9, H)
    ids, shares = reference.routed(9, 2, E)

    out = module(x, ids, shares)

    act = torch.nn.functional.silu if layout == "plain" else reference.silu_and_mul
    truth = reference.of_module(module, BLOCK, act, quantize=True)
    assert oracle.sqnr(out, truth(x.double(), ids, shares.double())).min() > 100


@every_route
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_working_dtypes(dtype: torch.dtype, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(route, monkeypatch)
    module = make_module()
    x = torch.randn(2, 5, H).to(dtype)
    ids, weights = reference.routed(10, 2, E)

    out = module(x, ids.view(2, 5, 2).int(), weights.view(2, 5, 2).to(dtype))

    assert (out.shape, out.dtype) == (x.shape, dtype)
    truth = reference.of_module(module, BLOCK, quantize=True)
    expected = truth(x.double().flatten(0, 1), ids, weights.to(dtype).double())
    # The intermediate is rounded to 8 or 11 bits before its own quantisation, which moves codes.
    assert oracle.sqnr(out.flatten(0, 1), expected).min() > 30


@every_route
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_ids_of_no_expert_add_nothing(
    id_dtype: torch.dtype, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(route, monkeypatch)
    module = make_module(bias=True)
    x = torch.randn(12, H, requires_grad=True)
    ids, weights = reference.routed(12, 3, E)
    unknown = torch.rand(12, 3) < 0.6
    unknown[0] = True
    ids = torch.where(unknown, torch.tensor([-1, E, 127])[torch.randint(3, (12, 3))], ids)
    weights = torch.where(unknown, torch.nan, weights).requires_grad_()

    out = module(x, ids.to(id_dtype), weights)
    out.sum().backward()

    truth = reference.of_module(module, BLOCK, quantize=True)
    clean = torch.where(unknown, 0, weights.detach()).double()
    expected = truth(x.detach().double(), ids, clean)
    assert not out[0].any()
    assert oracle.sqnr(out.detach()[1:], expected[1:]).min() > 90
    assert weights.grad is not None
    assert x.grad is not None
    assert not weights.grad[unknown].any()
    assert bool(weights.grad[~unknown].all())
    assert not x.grad[0].any()
    assert bool(x.grad.isfinite().all())


def test_small_unsigned_ids_with_as_many_experts_as_they_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = {"up_proj": torch.randn(256, 8, 16), "down_proj": torch.randn(256, 16, 8)}
    module = FP8Experts.from_weights(weights, "row")
    x, ids = torch.randn(3, 16), torch.tensor([[255], [0], [200]])

    for route in ("batched", "grouped"):
        take(route, monkeypatch)
        small = module(x, ids.to(torch.uint8), torch.ones(3, 1))
        assert torch.equal(small, module(x, ids, torch.ones(3, 1)))
        assert bool(small.any(-1).all())


@every_route
def test_a_nan_stays_in_its_token(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(route, monkeypatch)
    module = make_module()
    x = torch.randn(6, H)
    ids, weights = reference.routed(6, 2, E)
    clean = module(x, ids, weights)
    x[2, 5] = torch.nan

    out = module(x, ids, weights)

    rest = [0, 1, 3, 4, 5]
    assert bool(out[2].isnan().all())
    assert torch.equal(out[rest], clean[rest])


@every_route
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (3, 0), (1, 1)])
def test_few_rows(tokens: int, top_k: int, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(route, monkeypatch)
    module = make_module()
    ids, weights = reference.routed(tokens, top_k, E)

    out = module(torch.randn(tokens, H), ids, weights)

    assert out.shape == (tokens, H)
    assert bool(out.any()) == (tokens * top_k > 0)


@given(
    tokens=st.integers(1, 12),
    experts=st.integers(1, 7),
    inner=st.integers(1, 40),
    hidden=st.integers(1, 70),
    data=st.data(),
)
def test_both_ways_agree(
    tokens: int, experts: int, inner: int, hidden: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    weights = {
        "gate_up_proj": torch.randn(experts, 2 * inner, hidden),
        "down_proj": torch.randn(experts, hidden, inner),
    }
    module = FP8Experts.from_weights(weights, "block", block_size=(16, 16))
    x = torch.randn(tokens, hidden)
    ids, shares = reference.routed(tokens, top_k, experts)
    ids = torch.where(torch.rand(ids.shape) < 0.3, experts, ids)

    outs = []
    for route in ("batched", "grouped"):
        with pytest.MonkeyPatch.context() as patch:
            take(route, patch)
            outs.append(module(x, ids, shares))

    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)


def test_the_way_is_chosen_by_rows_per_expert() -> None:
    enough = math.ceil(forward.GROUPED_FROM * E)

    assert forward.way(enough - 1, E) == "batched"
    assert forward.way(enough, E) == "grouped"
    assert forward.way(0, E) == "batched"


def test_outputs_and_gradients_under_autocast() -> None:
    module = make_module()
    x = torch.randn(4, H, requires_grad=True)
    ids, weights = reference.routed(4, 2, E)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, ids, weights)
    out.float().sum().backward()

    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    truth = reference.of_module(module, BLOCK, quantize=True)
    expected = truth(x.detach().double(), ids, weights.double())
    assert oracle.sqnr(out.detach(), expected).min() > 30


# Layouts of scales.


def test_one_scale_for_each_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """As checkpoints of per-tensor gate and up come out when they are fused: [E, 2, 1]."""
    apart = FP8Experts.from_weights(make_weights("apart"), "tensor")
    tensors = {
        "gate_up_proj": torch.cat([apart.gate_proj.data, apart.up_proj.data], 1),
        "gate_up_proj_scale_inv": torch.stack(
            [apart.gate_proj_scale_inv.data, apart.up_proj_scale_inv.data], 1
        ),
        "down_proj": apart.down_proj.data,
        "down_proj_scale_inv": apart.down_proj_scale_inv.data.view(E, 1, 1),
    }
    fused = FP8Experts.from_tensors(tensors)
    x = torch.randn(6, H)
    ids, weights = reference.routed(6, 2, E)

    assert fused.split_scales
    assert fused.gate_up_proj_scale_inv.shape == (E, 2, 1)
    for route in ("batched", "grouped"):
        take(route, monkeypatch)
        torch.testing.assert_close(fused(x, ids, weights), apart(x, ids, weights))


@pytest.mark.parametrize(
    ("inner", "rows", "split"),
    [(128, 2, False), (192, 4, True), (192, 3, False), (64, 2, True), (64, 1, False)],
)
def test_split_grids_are_told_by_their_rows(inner: int, rows: int, split: bool) -> None:
    tensors = {
        "gate_up_proj": torch.zeros(E, 2 * inner, H).to(torch.float8_e4m3fn),
        "gate_up_proj_scale_inv": torch.rand(E, rows, 2),
        "down_proj": torch.zeros(E, H, inner).to(torch.float8_e4m3fn),
        "down_proj_scale_inv": torch.rand(E, 2, -(-inner // 128)),
    }

    assert FP8Experts.from_tensors(tensors, block_size=(128, 128)).split_scales == split


@pytest.mark.parametrize("inner", [96, 224])
def test_a_grid_that_can_be_split_or_whole_must_be_stated(inner: int) -> None:
    apart = make_module(layout="apart", inner=inner)
    tensors = {
        "gate_up_proj": torch.cat([apart.gate_proj.data, apart.up_proj.data], 1),
        "gate_up_proj_scale_inv": torch.cat(
            [apart.gate_proj_scale_inv.data, apart.up_proj_scale_inv.data], 1
        ),
        "down_proj": apart.down_proj.data,
        "down_proj_scale_inv": apart.down_proj_scale_inv.data,
    }
    x = torch.randn(6, H)
    ids, weights = reference.routed(6, 2, E)

    with pytest.raises(AmbiguousRecipeError, match="split_scales=True"):
        FP8Experts.from_tensors(tensors)
    split = FP8Experts.from_tensors(tensors, split_scales=True)
    whole = FP8Experts.from_tensors(tensors, split_scales=False)

    torch.testing.assert_close(split(x, ids, weights), apart(x, ids, weights))
    assert not torch.allclose(whole(x, ids, weights), apart(x, ids, weights), rtol=1e-3)


# The module.


# Quantisation.


# What is refused.
