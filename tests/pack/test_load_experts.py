"""`load` of mixtures of experts: one matrix each in the files, stacked in Transformers' models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fp8dispatch
from fp8dispatch.errors import CheckpointError
from fp8dispatch.moe.experts import SCALE, FP8Experts
from fp8dispatch.moe.quantize import dequantize_experts
from fp8dispatch.pack.calibration import Calibration
from fp8dispatch.pack.options import PackOptions
from fp8dispatch.pack.packing import pack_checkpoint
from fp8dispatch.pack.unpack import unpack
from tests.pack.folders import assert_one_sentence

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

transformers = pytest.importorskip("transformers", minversion="5.14")

pytestmark = pytest.mark.filterwarnings("ignore")  # Transformers' own

EXPERTS, HIDDEN, INNER = 8, 128, 96
COMMON = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
}


def mixtral() -> Any:
    """Its files name the layers otherwise than the model: ``block_sparse_moe.experts.0.w1``."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**COMMON, intermediate_size=INNER, num_local_experts=EXPERTS)
    )


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **COMMON,
            intermediate_size=192,
            moe_intermediate_size=INNER,
            head_dim=64,
            num_experts=EXPERTS,
            mlp_only_layers=[0],
        )
    )


def deepseek_v3() -> Any:
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **COMMON,
            intermediate_size=192,
            moe_intermediate_size=INNER,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            kv_lora_rank=64,
            q_lora_rank=64,
            qk_rope_head_dim=16,
            qk_nope_head_dim=48,
            v_head_dim=64,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "deepseek-v3": deepseek_v3,
}
RECIPES = {
    "channel": "compressed-tensors",
    "block128": "native",
    "block128-ue8m0": "native",
    "group32": "native",
    "tensor-static": "compressed-tensors",
}


def packed(
    name: str, recipe: str, folder: Path, skip: tuple[str, ...] = ()
) -> tuple[torch.nn.Module, Path]:
    """A tiny model, and where it lies in FP8."""
    torch.manual_seed(3)
    model = MODELS[name]().float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # large enough that the experts matter to the output
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder / "source")
    files = load_file(folder / "source" / "model.safetensors")
    scales = {one.removesuffix(".weight"): 0.03 for one in files if one.endswith(".weight")}
    options = PackOptions(recipe=recipe, layout=RECIPES[recipe], skip=skip)
    pack_checkpoint(
        folder / "source",
        folder / "fp8",
        options,
        calibration=Calibration(scales) if recipe == "tensor-static" else None,
        report=False,
    )
    return model, folder / "fp8"


def experts_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith("mlp.experts")}


def stacked(experts: torch.nn.Module, name: str) -> torch.Tensor:
    """The values of a projection [E, N, K]; gate and up may be apart."""
    if name == "gate_up_proj" and not hasattr(experts, name):
        return torch.cat([stacked(experts, one) for one in ("gate_proj", "up_proj")], 1)
    weight, scale = getattr(experts, name), getattr(experts, name + SCALE)
    parts = [(weight, scale)]
    if name == "gate_up_proj" and experts.split_scales:
        parts = list(zip(weight.chunk(2, 1), scale.chunk(2, 1), strict=True))
    values = [
        dequantize_experts(one, two, block_size=experts.block_size, dtype=torch.float32)  # type: ignore[arg-type]
        for one, two in parts
    ]
    return torch.cat(values, 1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_experts_are_built_and_compute_as_the_restored_model(
    name: str, recipe: str, tmp_path: Path
) -> None:
    model, folder = packed(name, recipe, tmp_path)
    unpack(folder, tmp_path / "restored", dtype=torch.float32)
    restored = type(model).from_pretrained(tmp_path / "restored").eval()

    loaded = fp8dispatch.load(folder)

    assert type(loaded) is type(model)
    ours, theirs = experts_of(loaded), experts_of(restored)
    assert ours and ours.keys() == theirs.keys()
    x = torch.randn(10, theirs[next(iter(theirs))].down_proj.shape[1])
    for layer, experts in ours.items():
        assert isinstance(experts, FP8Experts)
        for projection in ("gate_up_proj", "down_proj"):
            assert torch.equal(stacked(experts, projection), getattr(theirs[layer], projection))
        ids = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in x])
        shares = torch.rand(10, 2)
        with torch.no_grad():
            wanted, found = theirs[layer](x, ids, shares), experts(x, ids, shares)
        error = float((found - wanted).norm() / wanted.norm())
        assert 1e-3 < error < 0.12  # the inputs of two matmuls in FP8; static ones of a guess
    logits = loaded(torch.arange(12)[None] % 50).logits
    assert torch.isfinite(logits).all()
    before = restored(torch.arange(12)[None] % 50).logits
    assert torch.nn.functional.cosine_similarity(logits.flatten(), before.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("name", MODELS)
def test_experts_that_are_not_quantised_are_stacked(name: str, tmp_path: Path) -> None:
    model, folder = packed(name, "channel", tmp_path, skip=("*.experts.*",))

    loaded = fp8dispatch.load(folder)

    for layer, experts in experts_of(loaded).items():
        for projection in ("gate_up_proj", "down_proj"):
            wanted = getattr(model.get_submodule(layer), projection)
            assert torch.equal(getattr(experts, projection), wanted)
    assert any(isinstance(one, fp8dispatch.FP8Linear) for one in loaded.modules())


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PREFIX = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("skip", "edit", "words"),
    [
        ((f"{PREFIX}.5.up_proj",), None, ("up_proj of 8 experts", f"none for {PREFIX}.5.up_proj")),
        (
            (),
            lambda t: [t.pop(one) for one in list(t) if ".experts.7." in one],
            ("gate_proj of 8 experts", f"none for {PREFIX}.7.gate_proj"),
        ),
        (
            (),
            lambda t: t.update(
                {one.replace(".7.", ".8."): t[one].clone() for one in t if ".experts.7." in one}
            ),
            ("also expert 8",),
        ),
        (
            (),
            lambda t: t.update({f"{PREFIX}.0.up_proj.weight": t[f"{PREFIX}.0.up_proj.weight"][:9]}
            | {f"{PREFIX}.0.up_proj.weight_scale": t[f"{PREFIX}.0.up_proj.weight_scale"][:9]}),
            (f"{PREFIX}.0.up_proj.weight must have shape [96, 128]", "[9, 128]"),
        ),
        (
            (),
            lambda t: t.update({f"{PREFIX}.0.up_proj.bias": torch.ones(96)}),
            (f"{PREFIX}.0.up_proj.bias", "without biases"),
        ),
    ],
    ids=["one kept", "one missing", "one too many", "another shape", "a bias"],
)  # fmt: skip
def test_experts_that_are_not_whole_are_refused(
    skip: tuple[str, ...],
    edit: Callable[[dict[str, torch.Tensor]], object] | None,
    words: tuple[str, ...],
    tmp_path: Path,
) -> None:
    model, folder = packed("qwen3-moe", "channel", tmp_path, skip=skip)
    if edit is not None:
        rewrite(folder, edit)
    before = {name: id(module) for name, module in model.named_modules()}

    with pytest.raises(CheckpointError) as caught:
        fp8dispatch.load(folder, model=model)

    assert_one_sentence(str(caught.value), *words)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_experts_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    model, folder = packed("qwen3-moe", "channel", tmp_path)
    for experts in experts_of(model).values():
        experts._apply_gate = lambda x: x.chunk(2, -1)[0].sin()  # type: ignore[assignment, operator]

    with pytest.raises(CheckpointError) as caught:
        fp8dispatch.load(folder, model=model)

    assert_one_sentence(str(caught.value), "needs experts that FP8Experts can stand for", "model=")
