"""`FP8Linear` and `convert_model`: the layer that lives in a model, saves, loads and moves."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fp8dispatch import (
    DTypeError,
    FP8Linear,
    InvalidInputError,
    NumericalOverflowError,
    ShapeError,
    UnknownBackendError,
    convert_model,
    fp8_linear,
    quantize,
)
from fp8dispatch.formats import SCALE_DTYPES
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.oracle import RECIPES, name_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N, K = 200, 300

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def make_layer(recipe: Recipe = RECIPES["block-128x128"], device: str = "cpu") -> FP8Linear:
    return FP8Linear.from_linear(
        nn.Linear(K, N, device=device),
        recipe,
        activation_scale=torch.full((1,), 0.01, device=device),
    )


@every_recipe
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
def test_from_linear(recipe: Recipe, scale_dtype: torch.dtype, device: str) -> None:
    linear = nn.Linear(K, N, device=device)
    x = torch.randn(5, K, device=device)

    layer = FP8Linear.from_linear(linear, recipe, scale_dtype=scale_dtype)

    weight, scale = quantize(linear.weight, recipe, scale_dtype=scale_dtype)
    assert torch.equal(bits(layer.weight), bits(weight))
    assert torch.equal(bits(layer.weight_scale), bits(scale))
    assert layer.bias is linear.bias
    assert layer.recipe == recipe
    out = layer(x)
    assert torch.equal(out, fp8_linear(x, weight, scale, linear.bias, block_size=recipe.block_size))
    oracle.assert_matches(out, oracle.linear_truth(x, weight, scale, recipe, linear.bias))


@every_recipe
def test_from_tensors_copies_nothing(recipe: Recipe, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    bias = torch.randn(N, device=device)
    x = torch.randn(5, K, device=device, dtype=torch.bfloat16)

    layer = FP8Linear.from_tensors(weight, scale, bias, block_size=recipe.block_size)

    assert (layer.in_features, layer.out_features) == (K, N)
    for held, given in ((layer.weight, weight), (layer.weight_scale, scale), (layer.bias, bias)):
        assert held.data_ptr() == given.data_ptr()
    assert torch.equal(layer(x), fp8_linear(x, weight, scale, bias, block_size=recipe.block_size))


def test_from_tensors_refuses_what_fp8_linear_refuses() -> None:
    weight, scale = oracle.make_weight(N, K, RECIPES["row"])

    with pytest.raises(ShapeError, match="bias must be"):
        FP8Linear.from_tensors(weight, scale, torch.zeros(K))
    with pytest.raises(ShapeError, match="weight_scale"):
        FP8Linear.from_tensors(weight, scale[1:])
    with pytest.raises(DTypeError, match="float8"):
        FP8Linear.from_tensors(weight.float(), scale)
    with pytest.raises(DTypeError, match=r"torch\.nn\.Linear"):
        FP8Linear.from_linear(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]


@every_recipe
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
def test_a_new_layer_gives_zeros_until_it_is_loaded(
    recipe: Recipe, scale_dtype: torch.dtype, device: str
) -> None:
    layer = FP8Linear(
        K,
        N,
        recipe=recipe,
        dtype=torch.float8_e5m2,
        scale_dtype=scale_dtype,
        bias_dtype=torch.bfloat16,
        static_activations=True,
        device=device,
    )

    assert layer.weight.dtype == torch.float8_e5m2
    assert layer.weight_scale.dtype == scale_dtype
    assert layer.weight_scale.shape == recipe.scale_shape(N, K)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer(torch.randn(2, K, device=device)), torch.zeros(2, N, device=device))


def test_an_empty_layer_needs_no_memory_on_meta() -> None:
    layer = FP8Linear(1 << 20, 1 << 20, bias=False, device="meta")

    assert layer.weight.is_meta
    assert layer(torch.empty(3, 1 << 20, device="meta")).shape == (3, 1 << 20)


@every_recipe
def test_state_dict_round_trip(recipe: Recipe, device: str, tmp_path: Path) -> None:
    layer = make_layer(recipe, device)
    state = layer.state_dict()
    assert list(state) == ["weight", "weight_scale", "activation_scale", "bias"]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a")
    torch.save(state, tmp_path / "b")
    x = torch.randn(5, K, device=device)
    expected = layer(x)
    for loaded in (
        state,
        load_file(tmp_path / "a", device=device),
        torch.load(tmp_path / "b", weights_only=True),
    ):
        empty = FP8Linear(K, N, recipe=recipe, static_activations=True, device=device)
        empty(x)  # what is prepared from the old scales must not survive

        empty.load_state_dict(loaded, strict=True)

        assert torch.equal(empty(x), expected)
        assert torch.equal(bits(empty.weight), bits(layer.weight))


def test_load_state_dict_is_strict(device: str) -> None:
    state = make_layer(device=device).state_dict()

    with pytest.raises(RuntimeError, match="activation_scale"):
        FP8Linear(K, N, device=device).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        FP8Linear(K, N, recipe="row", static_activations=True).load_state_dict(state)


def test_load_by_assignment_into_a_meta_layer(device: str) -> None:
    layer = make_layer(device=device)
    empty = FP8Linear(K, N, static_activations=True, device="meta")

    empty.load_state_dict(layer.state_dict(), assign=True)

    x = torch.randn(5, K, device=device)
    assert torch.equal(empty(x), layer(x))


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "to(bfloat16)": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "to(device, float16)": (
        lambda model: model.to(next(model.parameters()).device, torch.float16),
        torch.float16,
    ),
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "float": (lambda model: model.bfloat16().float(), torch.float32),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("recipe", ["block-128x128", "row", "tensor"])
def test_casts_change_the_bias_alone(
    recipe: str, cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype, device: str
) -> None:
    layer = make_layer(RECIPES[recipe], device)
    before = {name: (tensor.dtype, bits(tensor)) for name, tensor in layer.named_parameters()}
    x = torch.randn(5, K, device=device).to(dtype)

    moved = cast(nn.Sequential(layer))[0]

    assert moved is layer
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    for name in ("weight", "weight_scale", "activation_scale"):
        tensor = getattr(layer, name)
        assert tensor.dtype == before[name][0], name
        assert torch.equal(bits(tensor), before[name][1]), name
        assert not tensor.requires_grad
    truth = oracle.linear_truth(
        x, layer.weight, layer.weight_scale, layer.recipe, layer.bias, layer.activation_scale
    )
    oracle.assert_matches(layer(x), truth)


def test_double_keeps_the_weight(device: str) -> None:
    layer = make_layer(device=device).double()

    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight_scale.dtype == torch.float32
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float64
    with pytest.raises(DTypeError, match="X must be one of"):
        layer(torch.randn(2, K, device=device, dtype=torch.float64))


def test_moving_to_meta_and_back(device: str) -> None:
    layer = make_layer(device=device).to("meta")

    assert all(tensor.is_meta for tensor in layer.parameters())
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer(torch.empty(3, K, device="meta", dtype=torch.float16)).dtype == torch.float16
    layer.to_empty(device=device)
    assert layer.weight.device.type == device


def test_deepcopy_is_independent(device: str) -> None:
    layer = make_layer(device=device)
    x = torch.randn(5, K, device=device)
    before = layer(x)

    twin = copy.deepcopy(layer)

    assert torch.equal(twin(x), before)
    assert (twin.recipe, twin.backend) == (layer.recipe, layer.backend)
    with torch.no_grad():
        twin.weight_scale.mul_(2)
        twin.bias.zero_()
    assert torch.equal(layer(x), before)
    assert not torch.equal(twin(x), before)


def test_a_whole_module_can_be_pickled(device: str, tmp_path: Path) -> None:
    layer = make_layer(device=device)
    torch.save(layer, tmp_path / "layer")

    loaded = torch.load(tmp_path / "layer", weights_only=False)

    x = torch.randn(5, K, device=device)
    assert torch.equal(loaded(x), layer(x))


def test_extra_repr() -> None:
    weight, scale = oracle.make_weight(N, K, RECIPES["block-48x80"])
    layer = FP8Linear.from_tensors(weight, scale, block_size=(48, 80), backend="eager")

    assert repr(layer) == (
        "FP8Linear(in_features=300, out_features=200, bias=False, recipe=block 48x80, "
        "dtype=float8_e4m3fn, backend='eager')"
    )
    assert "bias=True" in repr(make_layer())
    assert "static activations" in repr(make_layer())


def test_only_the_bias_trains(device: str) -> None:
    layer = make_layer(device=device)
    x = torch.randn(5, K, device=device, requires_grad=True)

    layer(x).sum().backward()

    trainable = [name for name, tensor in layer.named_parameters() if tensor.requires_grad]
    assert trainable == ["bias"]
    assert torch.equal(layer.bias.grad, torch.full((N,), 5.0, device=device))
    assert x.grad is not None


def test_a_forced_backend_is_kept() -> None:
    layer = FP8Linear.from_linear(nn.Linear(K, N), backend="eager")

    assert layer.explain(torch.randn(2, K)).decided_by == "argument backend="
    assert "backend='eager'" in repr(layer)


def test_an_unknown_backend_is_refused_at_once() -> None:
    with pytest.raises(UnknownBackendError, match="nonsense"):
        FP8Linear.from_linear(nn.Linear(K, N), backend="nonsense")


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.ReLU())])
        self.named = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(32, 16, bias=False)})})
        self.lm_head = nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        return self.lm_head(x).sum() + self.router(x).sum() + self.named["a"]["b"](x).sum()


@pytest.mark.parametrize("recipe", ["block", "row", "tensor"])
def test_convert_model_walks_nested_containers(recipe: str, device: str) -> None:
    model = nn.Sequential(Branch(), Branch()).to(device)
    model[1].eval()
    linears = {name: mod for name, mod in model.named_modules() if type(mod) is nn.Linear}

    report = convert_model(model, recipe, skip=["lm_head", "1.router", "1.named.*"])

    assert dict(report.skipped) == {
        "0.lm_head": "skip='lm_head'",
        "1.lm_head": "skip='lm_head'",
        "1.router": "skip='1.router'",
        "1.named.a.b": "skip='1.named.*'",
    }
    assert report.converted == ("0.router", "0.layers.0.0", "0.named.a.b", "1.layers.0.0")
    for name, old in linears.items():
        new = model.get_submodule(name)
        assert isinstance(new, FP8Linear) == (name in report.converted)
        assert new.training == old.training
        assert new.bias is old.bias
    assert report.bytes_before == sum(linears[name].weight.nbytes for name in report.converted)
    assert report.bytes_after == sum(
        tensor.nbytes
        for name in report.converted
        for key, tensor in model.get_submodule(name).named_parameters()
        if key != "bias"
    )
    assert report.bytes_after < report.bytes_before / 3
    model[0](torch.randn(2, 32, device=device)).backward()


@pytest.mark.parametrize(
    ("skip", "spared"),
    [
        ([], set()),
        (["0"], {"layers.0.0"}),
        (["layers.0.0"], {"layers.0.0"}),
        (["head"], set()),
        (["b", "router"], {"named.a.b", "router"}),
        (["*e*"], {"router", "layers.0.0", "named.a.b", "lm_head"}),
        (["ROUTER"], set()),
    ],
)
def test_skip_by_name_suffix_and_pattern(skip: list[str], spared: set[str]) -> None:
    report = convert_model(Branch(), skip=skip)

    assert {name for name, _ in report.skipped} == spared


def test_subclasses_of_linear_are_left_to_their_owners(device: str) -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True, device=device)
    model = nn.ModuleDict({"attention": attention, "out": nn.Linear(32, 32, device=device)})
    x = torch.randn(2, 3, 32, device=device)
    before = attention(x, x, x)[0]

    report = convert_model(model)

    assert report.converted == ("out",)
    assert report.skipped == (
        ("attention.out_proj", "a subclass of nn.Linear (NonDynamicallyQuantizableLinear)"),
    )
    assert torch.equal(attention(x, x, x)[0], before)


def test_tied_layers_stay_tied(device: str) -> None:
    shared = nn.Linear(32, 32, device=device)
    model = nn.ModuleDict({"a": shared, "deep": nn.Sequential(shared), "other": nn.Linear(32, 32)})

    report = convert_model(model)

    assert model["a"] is model["deep"][0]
    assert isinstance(model["a"], FP8Linear)
    assert report.converted == ("a", "deep.0", "other")
    assert report.bytes_before == 2 * 32 * 32 * 4, "the shared weight is counted once"
    assert list(model.state_dict())[:3] == ["a.weight", "a.weight_scale", "a.bias"]


@pytest.mark.parametrize("broken", ["first", "last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_conversion_is_all_or_nothing(broken: str, value: float) -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("first", "middle", "last")})
    with torch.no_grad():
        model[broken].weight[1, 2] = value

    with pytest.raises(NumericalOverflowError, match=rf"layer '{broken}'"):
        convert_model(model)

    assert all(type(layer) is nn.Linear for layer in model.values())


@pytest.mark.parametrize("model", [nn.Linear(8, 8), "model", None])
def test_what_cannot_be_converted_in_place_is_refused(model: Any) -> None:
    with pytest.raises(InvalidInputError, match="convert_model needs a module"):
        convert_model(model)


def test_a_string_is_no_list_of_names() -> None:
    with pytest.raises(InvalidInputError, match="skip must be a list"):
        convert_model(Branch(), skip="lm_head")
