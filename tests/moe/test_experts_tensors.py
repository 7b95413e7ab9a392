"""The tensors of `FP8Experts`: names, loading, moving, copies, quantising, and what is refused."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fp8dispatch import (
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
from tests.moe.experts_cases import (
    INNER,
    E,
    H,
    every_recipe,
    make_module,
    make_weights,
)
from tests.oracle import RECIPES, name_of

if TYPE_CHECKING:
    from pathlib import Path

    from fp8dispatch.recipe import Recipe


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
