"""`FP8Experts`: its numbers against plain experts in float64, its layouts, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from fp8dispatch import (
    AmbiguousRecipeError,
    DTypeError,
    FP8Experts,
    InvalidInputError,
    NumericalOverflowError,
    ScaleValueError,
    ShapeError,
    UnknownBackendError,
    dequantize_experts,
    quantize,
    quantize_experts,
)
from fp8dispatch.formats import SCALE_DTYPES
from fp8dispatch.moe import forward
from tests import oracle
from tests.moe import reference
from tests.oracle import RECIPES, name_of

if TYPE_CHECKING:
    from pathlib import Path

    from fp8dispatch.recipe import Recipe

E, INNER, H = 5, 96, 160
BLOCK = RECIPES["block-128x128"]

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
every_route = pytest.mark.parametrize("route", ["batched", "grouped"])


def make_weights(
    layout: str = "fused", *, bias: bool = False, static: bool = False, inner: int = INNER
) -> dict[str, torch.Tensor]:
    """Unquantised experts under the names of the module."""
    into = {
        "fused": {"gate_up_proj": 2 * inner},
        "apart": {"gate_proj": inner, "up_proj": inner},
        "plain": {"up_proj": inner},
    }[layout]
    weights = {name: torch.randn(E, rows, H) * 0.1 for name, rows in into.items()}
    weights["down_proj"] = torch.randn(E, H, inner) * 0.1
    for name, weight in list(weights.items()):
        if bias:
            weights[f"{name}_bias"] = torch.randn(E, weight.shape[1])
        if static:
            weights[f"{name}_activation_scale"] = 0.005 + 0.01 * torch.rand(E)
    return weights


def make_module(recipe: Recipe = BLOCK, layout: str = "fused", **options: Any) -> FP8Experts:
    return FP8Experts.from_weights(make_weights(layout, **options), recipe)


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every forward go one way."""
    monkeypatch.setattr(forward, "GROUPED_FROM", {"batched": 10**9, "grouped": 0}[route])


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


def test_parameters_have_the_names_and_shapes_of_transformers() -> None:
    module = make_module(bias=True, static=True)

    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        "gate_up_proj": (E, 2 * INNER, H),
        "gate_up_proj_scale_inv": (E, 2, 2),
        "gate_up_proj_bias": (E, 2 * INNER),
        "gate_up_proj_activation_scale": (E,),
        "down_proj": (E, H, INNER),
        "down_proj_scale_inv": (E, 2, 1),
        "down_proj_bias": (E, H),
        "down_proj_activation_scale": (E,),
    }


@pytest.mark.parametrize("layout", ["fused", "apart", "plain"])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
def test_a_new_module_gives_zeros_until_it_is_loaded(
    layout: str, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = make_weights(layout, bias=True, static=True)
    source = FP8Experts.from_weights(weights, scale_dtype=scale_dtype)
    module = FP8Experts(
        E,
        H,
        INNER,
        gated=layout != "plain",
        fused=layout == "fused",
        activation="silu",
        bias=True,
        scale_dtype=scale_dtype,
        static_activations=True,
    )
    x = torch.randn(4, H)
    ids, shares = reference.routed(4, 2, E)
    assert not module(x, ids, shares).any()

    save_file(source.state_dict(), tmp_path / "experts.safetensors")
    module.load_state_dict(load_file(tmp_path / "experts.safetensors"))

    assert torch.equal(module(x, ids, shares), source(x, ids, shares))
    assert module.extra_repr() == source.extra_repr()


def test_from_tensors_copies_nothing_and_biases_are_shared() -> None:
    bias = nn.Parameter(torch.randn(E, H))
    weights = {**make_weights("plain"), "up_proj_bias": torch.zeros(E, INNER)}
    quantized = FP8Experts.from_weights({**weights, "down_proj_bias": bias})

    again = FP8Experts.from_tensors(dict(quantized.named_parameters()))

    assert quantized.down_proj_bias is bias
    assert again.down_proj_bias is bias
    for name, parameter in again.named_parameters():
        assert parameter.data_ptr() == getattr(quantized, name).data_ptr()
        assert parameter.requires_grad == (name == "down_proj_bias")


@pytest.mark.parametrize("how", ["bfloat16", "half", "double", "to", "meta"])
def test_moving_never_casts_what_is_quantised(how: str) -> None:
    module = make_module(bias=True, static=True, recipe=RECIPES["row"])
    before = {name: (p.dtype, p.data.clone()) for name, p in module.named_parameters()}

    if how == "meta":
        module.to("meta", torch.float16)
    else:
        module.to(torch.bfloat16) if how == "to" else getattr(module, how)()

    for name, parameter in module.named_parameters():
        dtype, data = before[name]
        if name.endswith("_bias"):
            assert parameter.dtype != torch.float32
        else:
            assert parameter.dtype == dtype
            assert how == "meta" or torch.equal(
                parameter.data.view(torch.uint8), data.view(torch.uint8)
            )


def saved_and_loaded(module: FP8Experts) -> FP8Experts:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: FP8Experts = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("clone", [copy.deepcopy, saved_and_loaded])
def test_copies_compute_the_same(clone: Any) -> None:
    module = FP8Experts.from_weights(make_weights(), activation="gelu_pytorch_tanh", top_k=2)
    x = torch.randn(4, H)
    ids, weights = reference.routed(4, 2, E)

    twin = clone(module)

    assert torch.equal(twin(x, ids, weights), module(x, ids, weights))
    assert twin.top_k == 2
    assert twin.down_proj.data_ptr() != module.down_proj.data_ptr()


def test_meta_tensors_give_a_meta_tensor() -> None:
    module = FP8Experts(256, 7168, 2048, device="meta")
    x = torch.empty(2, 3, 7168, device="meta", dtype=torch.bfloat16)
    ids = torch.zeros(2, 3, 8, dtype=torch.int64, device="meta")

    out = module(x, ids, torch.empty(2, 3, 8, device="meta"))

    assert (out.shape, out.dtype, out.device.type) == (x.shape, x.dtype, "meta")


# Quantisation.


@every_recipe
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
def test_each_expert_is_quantised_by_itself(recipe: Recipe, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(3, 50, 70) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)

    data, scale = quantize_experts(weight, recipe, scale_dtype=scale_dtype)

    assert scale.shape == (3, *recipe.scale_shape(50, 70))
    assert scale.dtype == scale_dtype
    for index in range(3):
        one, multipliers = quantize(weight[index], recipe, scale_dtype=scale_dtype)
        assert torch.equal(data[index].view(torch.uint8), one.view(torch.uint8))
        assert torch.equal(scale[index].view(torch.uint8), multipliers.view(torch.uint8))
    restored = dequantize_experts(data, scale, block_size=recipe.block_size, dtype=torch.float32)
    exact = [oracle.dequantized_weight(d, s, recipe) for d, s in zip(data, scale, strict=True)]
    assert torch.equal(restored, torch.stack(exact).float())


def test_quantisation_refuses_in_a_sentence() -> None:
    weight = torch.randn(3, 4, 5)
    weight[2, 1, 1] = torch.inf

    with pytest.raises(NumericalOverflowError, match=r"expert 2: .*finite"):
        quantize_experts(weight)
    with pytest.raises(ShapeError, match=r"\[E, N, K\].*fp8dispatch.quantize"):
        quantize_experts(torch.randn(4, 5))
    with pytest.raises(ShapeError, match="at least one expert"):
        quantize_experts(torch.randn(0, 4, 5))
    with pytest.raises(DTypeError, match="dtype must be one of"):
        quantize_experts(torch.randn(1, 4, 5), dtype=torch.int8)
    data, scale = quantize_experts(torch.empty(2, 300, 200, device="meta"))
    assert (data.shape, scale.shape) == ((2, 300, 200), (2, 3, 2))


# What is refused.


def test_tensors_that_do_not_fit_are_refused() -> None:
    tensors = dict(make_module().state_dict())

    def wrap(given: dict[str, torch.Tensor]) -> FP8Experts:
        return FP8Experts.from_tensors(given, split_scales=False)

    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in tensors.items() if key != name}

    with pytest.raises(InvalidInputError, match="experts need the tensors gate_up_proj, down_proj"):
        wrap(without("down_proj"))
    with pytest.raises(InvalidInputError, match="found none named down_proj_scale_inv"):
        wrap(without("down_proj_scale_inv"))
    with pytest.raises(InvalidInputError, match="up_proj_bias belongs to none"):
        wrap({**tensors, "up_proj_bias": torch.zeros(E, INNER)})
    with pytest.raises(ShapeError, match=r"gate_up_proj must be \[5, 192, 160\]"):
        wrap({**tensors, "gate_up_proj": tensors["gate_up_proj"][:, :100]})
    with pytest.raises(ShapeError, match="bias must be"):
        wrap({**tensors, "down_proj_bias": torch.zeros(E)})
    with pytest.raises(DTypeError, match="float8"):
        wrap({**tensors, "down_proj": torch.zeros(E, H, INNER)})
    with pytest.raises(ScaleValueError, match="activation_scale must be finite and positive"):
        bad = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
        wrap({**tensors, "down_proj_activation_scale": bad})
    with pytest.raises(InvalidInputError, match="from_tensors"):
        FP8Experts.from_weights(tensors)
    with pytest.raises(DTypeError, match="block_size must be two integers"):
        FP8Experts.from_tensors(tensors, block_size=[128])
    with pytest.raises(UnknownBackendError):
        FP8Experts(2, 8, 8, backend="cutlas")
    with pytest.raises(ShapeError, match="num_experts must be a positive integer"):
        FP8Experts(0, 8, 8)


def test_calls_that_do_not_fit_are_refused() -> None:
    module = make_module()
    x = torch.randn(4, H)
    ids, weights = reference.routed(4, 2, E)

    with pytest.raises(ShapeError, match=r"expert_ids must be \[4, k\]"):
        module(x, ids[:3], weights[:3])
    with pytest.raises(ShapeError, match=r"expert_ids must be \[4, k\]"):
        module(x, ids[:, 0], weights[:, 0])
    with pytest.raises(ShapeError, match=r"expert_weights must be \[4, 2\]"):
        module(x, ids, weights[:, :1])
    with pytest.raises(DTypeError, match="expert_ids must be one of int32"):
        module(x, ids.float(), weights)
    with pytest.raises(DTypeError, match="expert_weights must be one of"):
        module(x, ids, weights.double())
    with pytest.raises(ShapeError, match="K=100"):
        module(torch.randn(4, 100), ids, weights)
    with pytest.raises(DTypeError, match="x must be one of bfloat16"):
        module(x.double(), ids, weights)
    up = [module._projection("gate_up_proj")]
    with pytest.raises(InvalidInputError, match="route must be"):
        forward.experts_forward(
            x, ids, weights, up, module.activation, module._projection("down_proj"), route="both"
        )
