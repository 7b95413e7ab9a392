"""Transformers and compressed-tensors themselves as oracles: what they make of our files, and
whether the verdicts say so; and models that `load` builds with Transformers.

Models are tiny and random; `bench.pipeline` does the same with real ones.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8dispatch
from fp8dispatch.pack.build import build_model
from fp8dispatch.pack.checkpoint import Checkpoint
from fp8dispatch.pack.layouts.contract import PackedModule
from fp8dispatch.pack.layouts.loadability import verdicts
from fp8dispatch.pack.options import PackOptions
from fp8dispatch.pack.packing import pack_checkpoint
from fp8dispatch.pack.scheme import SCHEMES
from tests.pack.packing import quantized, restored, write_packed

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # those packages' own

IDS = torch.arange(24).reshape(2, 12) % 50


def bert(hidden: int) -> Any:
    config = transformers.BertConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=256,
        vocab_size=50,
        max_position_embeddings=16,
    )
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are so small that errors hide
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def llama() -> Any:
    """Ragged in both ways, tied embeddings, rotary frequencies in a buffer."""
    config = transformers.LlamaConfig(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=320,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def linears(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def packed_model(folder: Path, model: Any, layout: str, scheme: str) -> Path:
    weights = linears(model)
    others = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in weights and name != "lm_head.weight"
    }
    config = {**json.loads(model.config.to_json_string(use_diff=False))}
    config["architectures"] = [type(model).__name__]
    return write_packed(folder, weights, layout, SCHEMES[scheme], others=others, config=config)


# format, scheme, hidden size, what Transformers on a CPU makes of it
OUTCOMES: list[tuple[str, str, int, str]] = [
    ("hf", "block128", 256, "right"),
    ("hf", "block128-ue8m0", 256, "right"),
    ("hf", "block128", 192, "wrong"),
    ("hf", "block128", 320, "raises"),
    ("compressed-tensors", "channel", 192, "right"),
    ("compressed-tensors", "tensor-static", 192, "right"),
    ("compressed-tensors", "block128", 256, "right"),
    ("compressed-tensors", "block128", 192, "raises"),
    ("compressed-tensors", "group64", 256, "right"),
    ("modelopt", "tensor-static", 256, "wrong"),
    ("native", "channel", 256, "raises"),
]


@pytest.mark.parametrize(
    ("layout", "scheme", "hidden", "outcome"),
    OUTCOMES,
    ids=[f"{layout}-{scheme}-{hidden}" for layout, scheme, hidden, _ in OUTCOMES],
)
def test_transformers_loads_what_the_verdict_says(
    layout: str, scheme: str, hidden: int, outcome: str, tmp_path: Path
) -> None:
    """Right means: every weight is codes * scale to the bit, and the model runs."""
    pytest.importorskip("accelerate")
    pytest.importorskip("compressed_tensors")
    model = bert(hidden)
    folder = packed_model(tmp_path, model, layout, scheme)
    weights = linears(model)
    exact = {
        name: restored(*quantized(weight, SCHEMES[scheme]), SCHEMES[scheme]).float()
        for name, weight in weights.items()
    }
    try:
        loaded = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        loaded(IDS)
    except (RuntimeError, ValueError) as error:
        assert outcome == "raises", error
    else:
        same = all(
            torch.equal(loaded.get_submodule(name).weight.float(), exact[name]) for name in weights
        )
        assert outcome == ("right" if same else "wrong")
    modules = {
        name: PackedModule(name, (weight.shape[0], weight.shape[1]), SCHEMES[scheme])
        for name, weight in weights.items()
    }
    found = verdicts(layout, modules, (), ["transformers"])
    assert all(verdict.loads for verdict in found) is (outcome == "right")


@pytest.mark.parametrize("scheme", ["channel", "tensor-static", "block128", "group64"])
def test_compressed_tensors_computes_the_same(scheme: str, tmp_path: Path) -> None:
    """Its simulation of FP8 activations and our layers, over the same files: they differ by the
    order of sums, which is far below the error of FP8 itself."""
    pytest.importorskip("accelerate")
    pytest.importorskip("compressed_tensors")
    model = bert(256)
    folder = packed_model(tmp_path, model, "compressed-tensors", scheme)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ours = fp8dispatch.load(folder)
    with torch.no_grad():
        plain, one, other = (m(IDS).last_hidden_state for m in (model, theirs, ours))
    quantisation = float((one - plain).norm() / plain.norm())
    difference = float((one - other).norm() / plain.norm())
    assert 0.005 < quantisation < 0.3
    assert difference < 0.2 * quantisation


def test_a_model_is_built_from_its_configuration_alone(tmp_path: Path) -> None:
    """Ragged weights, tied embeddings, rotary frequencies: the outputs are those of the same model
    converted in memory, to the bit."""
    model = llama()
    folder = packed_model(tmp_path, model, "native", "block128")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    loaded = fp8dispatch.load(folder)
    assert type(loaded) is type(model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.max_new_tokens == 7
    fp8dispatch.convert_model(model)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_building_leaves_torch_as_it_was(tmp_path: Path) -> None:
    """Parameters take no memory while a model is built, and only then."""
    before = torch.nn.Module.register_parameter
    packed = packed_model(tmp_path, llama(), "native", "channel")
    built = build_model(Checkpoint.open(packed))
    assert all(parameter.is_meta for parameter in built.parameters())
    buffers = list(built.buffers())
    assert buffers and not any(buffer.is_meta for buffer in buffers)
    assert torch.nn.Module.register_parameter is before
    assert not torch.nn.Linear(3, 3).weight.is_meta


@pytest.mark.parametrize(
    "options",
    [
        PackOptions(preset="cpu"),
        PackOptions(recipe="block128", layout="native"),
        PackOptions(target="vllm"),
    ],
    ids=["group64", "block128", "channel"],
)
def test_pack_on_the_cpu_run_on_the_device(
    options: PackOptions, device: str, tmp_path: Path
) -> None:
    """All of it: a BF16 model saved by Transformers, packed on the CPU, loaded onto the device and
    compared with BF16 there."""
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    pack_checkpoint(tmp_path / "bf16", tmp_path / "fp8", options, report=False)
    assert fp8dispatch.verify(tmp_path / "fp8", against=tmp_path / "bf16").ok

    loaded = fp8dispatch.load(tmp_path / "fp8", device=device)
    layers = [m for m in loaded.modules() if isinstance(m, fp8dispatch.FP8Linear)]
    assert len(layers) == 14 and all(layer.weight.device.type == device for layer in layers)
    with torch.no_grad():
        wanted = model.to(device)(IDS.to(device)).logits.float()
        found = loaded(IDS.to(device)).logits.float()
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)
    assert 0.996 < float(cosine) < 0.99999  # it is FP8, and FP8 is close
