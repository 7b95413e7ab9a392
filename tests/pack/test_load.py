"""`load` puts the stored bytes into `FP8Linear` layers; the rest of the model is assigned."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fp8dispatch
from fp8dispatch.errors import CheckpointError, DTypeError, UnknownBackendError
from fp8dispatch.formats import decode_scale
from fp8dispatch.pack import packed as packed_module
from fp8dispatch.pack.options import PackOptions
from fp8dispatch.pack.packing import pack_checkpoint
from fp8dispatch.pack.scheme import SCHEMES, Activations, Scheme
from tests.pack.folders import assert_one_sentence, same_bytes, write_model
from tests.pack.packing import (
    ACTIVATION_SCALE,
    quantized,
    random_weight,
    restored,
    write_packed,
)

if TYPE_CHECKING:
    from pathlib import Path


class Block(nn.Module):
    """Two linear layers, a norm, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(192, 256)
        self.norm = nn.LayerNorm(256)
        self.down = nn.Linear(256, 192, bias=False)
        self.register_buffer("step", torch.arange(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.norm(self.up(x)))
        return out


class Tied(nn.Module):
    """An embedding whose weight the head shares; the head is stored once."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.body = nn.ModuleDict({"proj": nn.Linear(64, 64)})
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight


WEIGHTS = {"up": random_weight(256, 192, 1), "down": random_weight(192, 256, 2)}
OTHERS = {
    "up.bias": torch.linspace(-1, 1, 256),
    "norm.weight": torch.linspace(0.5, 1.5, 256),
    "norm.bias": torch.linspace(-0.1, 0.1, 256),
}
ALL: list[tuple[str, str]] = [
    ("hf", "block128"),
    ("hf", "block128-ue8m0"),
    ("compressed-tensors", "channel"),
    ("compressed-tensors", "tensor-static"),
    ("modelopt", "tensor-static"),
    ("modelopt", "channel"),
    ("modelopt", "mxfp8"),
    ("fbgemm", "channel"),
    ("native", "group64"),
    ("native", "block128"),
]


def on_meta(make: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def change(folder: Path, **edits: torch.Tensor | None) -> Path:
    """Replace or remove tensors of a folder's only file; ``__`` in a name is a dot."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in edits.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize(("layout", "name"), ALL, ids=[f"{a}-{b}" for a, b in ALL])
def test_layers_hold_the_stored_bytes_and_compute_with_them(
    layout: str, name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device, in the stored dtypes; nothing is restored to floats on the way."""
    scheme = SCHEMES[name]
    folder = write_packed(tmp_path, WEIGHTS, layout, scheme, others=OTHERS)
    monkeypatch.setattr(packed_module, "restore", None)  # would raise if it was called
    model = Block()
    loaded = fp8dispatch.load(folder, device=device, model=model)
    assert loaded is model and not model.training
    for layer_name, weight in WEIGHTS.items():
        layer = model.get_submodule(layer_name)
        assert isinstance(layer, fp8dispatch.FP8Linear)
        codes, scale = quantized(weight, scheme)
        assert layer.weight.device.type == layer.weight_scale.device.type == device
        assert same_bytes(layer.weight.detach().cpu(), codes)
        assert str(layer.weight_scale.dtype) == f"torch.{scheme.scale_dtype}"
        assert torch.equal(decode_scale(layer.weight_scale.cpu()).reshape(scale.shape), scale)
        static = layer.activation_scale
        if scheme.activations is Activations.STATIC:
            assert static is not None and static.tolist() == [ACTIVATION_SCALE]
        else:
            assert static is None
        x = torch.randn(5, weight.shape[1], device=device)
        bias = OTHERS["up.bias"].to(device) if layer_name == "up" else None
        wanted = fp8dispatch.fp8_linear(
            x,
            codes.to(device),
            layer.weight_scale,
            bias,
            block_size=scheme.recipe.block_size,
            activation_scale=static,
        )
        assert torch.equal(layer(x), wanted)
    assert torch.equal(model.norm.weight.cpu(), OTHERS["norm.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("make", [Block, lambda: on_meta(Block)], ids=["real", "meta"])
def test_a_model_without_memory_gets_all_of_it(make: Any, tmp_path: Path) -> None:
    folder = write_packed(tmp_path, WEIGHTS, "native", SCHEMES["block128"], others=OTHERS)
    model = make()
    if model.up.weight.is_meta:
        model.step = torch.arange(3)  # such a buffer is its owner's: no file has it
    loaded = fp8dispatch.load(folder, model=model)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    scheme = SCHEMES["block128"]
    x = torch.randn(7, 192)
    exact = x.double() @ restored(*quantized(WEIGHTS["up"], scheme), scheme).T
    error = loaded.up(x).double() - OTHERS["up.bias"] - exact
    assert float(error.norm() / exact.norm()) < 0.05  # the input is quantised too


def test_shared_weights_stay_shared(tmp_path: Path) -> None:
    weight = {"body.proj": random_weight(64, 64)}
    others = {"embed.weight": torch.randn(32, 64), "body.proj.bias": torch.zeros(64)}
    folder = write_packed(tmp_path, weight, "ct", SCHEMES["channel"], others=others)
    for model in (Tied(), on_meta(Tied)):
        loaded = fp8dispatch.load(folder, model=model)
        assert loaded.head.weight is loaded.embed.weight
        assert torch.equal(loaded.head.weight, others["embed.weight"])


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_prefix_of_a_base_model_may_be_on_one_side_only(prefixed: bool, tmp_path: Path) -> None:
    weights = {f"body.{name}" if prefixed else name: weight for name, weight in WEIGHTS.items()}
    others = {f"body.{name}" if prefixed else name: tensor for name, tensor in OTHERS.items()}
    folder = write_packed(tmp_path, weights, "ct", SCHEMES["channel"], others=others)
    model: nn.Module = Block()
    if prefixed:
        model.base_model_prefix = "body"  # type: ignore[assignment]
        layer = fp8dispatch.load(folder, model=model).up
    else:
        model = nn.ModuleDict({"body": model})
        model.base_model_prefix = "body"  # type: ignore[assignment]
        layer = fp8dispatch.load(folder, model=model)["body"].up
    assert same_bytes(layer.weight.detach(), quantized(WEIGHTS["up"], SCHEMES["channel"])[0])


def test_layers_that_the_model_says_to_skip_are_skipped(tmp_path: Path) -> None:
    """As prediction layers are, which files hold and models do not build."""
    weights = {**WEIGHTS, "extra.proj": random_weight(8, 8)}
    others = {**OTHERS, "extra.norm.weight": torch.ones(8)}
    folder = write_packed(tmp_path, weights, "ct", SCHEMES["channel"], others=others)
    with pytest.raises(CheckpointError, match="extra"):
        fp8dispatch.load(folder, model=Block())
    model = Block()
    model._keys_to_ignore_on_load_unexpected = [r"^extra\."]  # type: ignore[assignment]
    assert isinstance(fp8dispatch.load(folder, model=model).up, fp8dispatch.FP8Linear)


def test_a_forced_backend_is_kept(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, WEIGHTS, "ct", SCHEMES["channel"], others=OTHERS)
    loaded = fp8dispatch.load(folder, model=Block(), backend="eager")
    assert loaded.up.backend == "eager"
    with pytest.raises(UnknownBackendError):
        fp8dispatch.load(folder, model=Block(), backend="fastest")


def test_weight_only_schemes_are_run_with_a_warning(tmp_path: Path) -> None:
    scheme = Scheme(SCHEMES["channel"].recipe, activations=Activations.NONE)
    folder = write_packed(tmp_path, WEIGHTS, "ct", scheme, others=OTHERS)
    with pytest.warns(UserWarning, match="the weights of 2 layers only; FP8Linear quantises their"):
        fp8dispatch.load(folder, model=Block())


@pytest.mark.parametrize("name", ["block128", "channel", "group64", "group32", "mxfp8"])
def test_pack_on_the_cpu_run_on_the_device(name: str, device: str, tmp_path: Path) -> None:
    """All of seed 004 without Transformers: BF16 weights packed on the CPU into codes and scales
    equal to those that the device computes itself, loaded there, and compared with BF16."""
    model = nn.Sequential(nn.Linear(384, 576), nn.GELU(), nn.Linear(576, 192, bias=False))
    model.to(torch.bfloat16)
    source = write_model(tmp_path / "bf16", model.state_dict())
    options = PackOptions(recipe=name, layout="native")
    pack_checkpoint(source, tmp_path / "fp8", options, report=False)
    empty = nn.Sequential(nn.Linear(384, 576), nn.GELU(), nn.Linear(576, 192, bias=False))
    loaded = fp8dispatch.load(tmp_path / "fp8", device=device, model=empty.to("meta"))

    scheme, model = SCHEMES[name], model.to(device)
    for place in (0, 2):
        codes, scale = fp8dispatch.quantize(
            model[place].weight.detach(),
            scheme.recipe,
            scale_dtype=getattr(torch, scheme.scale_dtype),
        )
        assert same_bytes(loaded[place].weight.detach().cpu(), codes.cpu())
        assert same_bytes(loaded[place].weight_scale.detach().cpu(), scale.cpu())
    x = torch.randn(33, 384, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, found = model(x).double(), loaded(x).double()
    signal, noise = wanted.square().sum(), (found - wanted).square().sum()
    assert 20 < float(10 * torch.log10(signal / noise)) < 40  # two layers of FP8 inputs and weights


class WrongSize(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(192, 128)


class NoBias(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(192, 256, bias=False)


class NoLinear(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(192, 256, 1)  # type: ignore[assignment]


class Larger(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("model", "edits", "names"),
    [
        (WrongSize, {}, ("up.weight", "Linear(192, 256, bias=True)", "out_features=128")),
        (NoBias, {}, ("up.weight", "bias=True", "bias=False")),
        (NoLinear, {}, ("up.weight", "Conv1d")),
        (Larger, {}, ("gate.weight", "gate.bias", "must be in the checkpoint")),
        (Block, {"up__bias": None}, ("up.weight", "bias=False")),
        (Block, {"norm__bias": None}, ("norm.bias", "must be in the checkpoint")),
        (Block, {"mtp__weight": torch.ones(2)}, ("mtp.weight", "needs a place in the model")),
        (Block, {"norm__bias": torch.ones(3)}, ("norm.bias", "[256]", "[3]")),
    ],
)
def test_a_model_and_a_checkpoint_that_differ(
    model: type[nn.Module], edits: dict[str, Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    """Nothing is left with random values, and nothing is dropped."""
    folder = write_packed(tmp_path, WEIGHTS, "ct", SCHEMES["channel"], others=OTHERS)
    change(folder, **edits)
    given = model()
    with pytest.raises(CheckpointError) as caught:
        fp8dispatch.load(folder, model=given)
    assert_one_sentence(str(caught.value), folder, *names)
    assert not any(isinstance(part, fp8dispatch.FP8Linear) for part in given.modules())


def test_what_is_no_module() -> None:
    with pytest.raises(DTypeError, match=r"load needs a torch.nn.Module as model, found int"):
        fp8dispatch.load("anywhere", model=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "architectures": ["NoSuchModel"]},
        {"model_type": "nosuchtype", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llama", "architectures": ["pipeline"]},
        {"model_type": "llama", "architectures": 3},
    ],
    ids=str,
)
def test_architectures_that_transformers_does_not_have(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """No other object of the package is called, and no code of the checkpoint is run."""
    pytest.importorskip("transformers")
    folder = write_packed(tmp_path, WEIGHTS, "ct", SCHEMES["channel"], config=config)
    (folder / "modeling.py").write_text("raise SystemExit('code of a checkpoint was run')")
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoModel": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        fp8dispatch.load(folder)
    assert_one_sentence(str(caught.value), folder, "must name an architecture", "pass model=")
