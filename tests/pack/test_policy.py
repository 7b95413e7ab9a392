"""The layer policy: which weights of which architecture are quantised, and fused experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8dispatch.errors import CheckpointError
from fp8dispatch.names import matches
from fp8dispatch.pack.checkpoint import Checkpoint
from fp8dispatch.pack.experts import is_fused, split
from fp8dispatch.pack.policy import LayerPolicy
from tests.pack.folders import assert_one_sentence, write_model

if TYPE_CHECKING:
    from pathlib import Path

# Model type -> modules that are quantised, and modules that stay.
TABLE: dict[str, tuple[str, str]] = {
    "llama": (
        "model.layers.0.self_attn.q_proj model.layers.0.mlp.down_proj",
        "lm_head model.embed_tokens model.norm model.layers.0.input_layernorm",
    ),
    "mixtral": (
        "model.layers.0.block_sparse_moe.experts.3.w1 model.layers.0.self_attn.k_proj",
        "model.layers.0.block_sparse_moe.gate",
    ),
    "qwen2_moe": (
        "model.layers.0.mlp.experts.7.gate_proj model.layers.0.mlp.shared_expert.up_proj",
        "model.layers.0.mlp.gate model.layers.0.mlp.shared_expert_gate",
    ),
    "qwen3_next": (
        "model.layers.3.self_attn.q_proj",
        "model.layers.0.linear_attn.in_proj_ba model.layers.0.linear_attn.out_proj mtp.fc",
    ),
    "llama4": (
        "language_model.model.layers.0.feed_forward.shared_expert.up_proj",
        "language_model.model.layers.0.feed_forward.router multi_modal_projector.linear_1 "
        "vision_model.model.layers.0.mlp.fc1",
    ),
    "deepseek_v3": (
        "model.layers.3.self_attn.kv_b_proj model.layers.3.self_attn.q_a_proj "
        "model.layers.61.mlp.experts.0.up_proj",
        "model.layers.3.mlp.gate model.layers.61.eh_proj model.layers.61.shared_head.head",
    ),
    "deepseek_v32": ("model.layers.3.self_attn.o_proj", "model.layers.3.self_attn.indexer.wk"),
    "nemotron_h": (
        "backbone.layers.0.mixer.in_proj backbone.layers.0.mixer.out_proj",
        "backbone.layers.0.mixer.gate backbone.embeddings backbone.layers.0.mixer.conv1d "
        "backbone.layers.0.mixer.fc1_latent_proj mtp.layers.0.mixer.q_proj",
    ),
    "granitemoehybrid": (
        "model.layers.0.shared_mlp.input_linear",
        "model.layers.0.block_sparse_moe.router.layer",
    ),
    "qwen2_vl": ("model.layers.0.mlp.up_proj", "visual.blocks.0.attn.qkv visual.merger.mlp.0"),
    "whisper": (
        "model.encoder.layers.0.self_attn.q_proj model.decoder.layers.0.fc1",
        "proj_out model.decoder.embed_tokens model.encoder.embed_positions",
    ),
    "siglip_vision_model": (
        "vision_model.encoder.layers.0.mlp.fc1",
        "vision_model.embeddings.patch_embedding",
    ),
    "gpt_neox": ("gpt_neox.layers.0.attention.query_key_value", "embed_out gpt_neox.embed_in"),
    "t5": (
        "encoder.block.0.layer.1.DenseReluDense.wi",
        "shared lm_head encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ),
    "bert": (
        "encoder.layer.0.attention.self.query encoder.layer.0.output.dense pooler.dense",
        "embeddings.word_embeddings cls.predictions.decoder classifier",
    ),
    "jamba": (
        "model.layers.0.mamba.in_proj",
        "model.layers.0.mamba.x_proj model.layers.0.mamba.dt_proj",
    ),
}


@pytest.mark.parametrize("kind", TABLE)
def test_the_table_of_an_architecture(kind: str) -> None:
    policy = LayerPolicy({"model_type": kind})
    quantized, kept = TABLE[kind]

    for name in quantized.split():
        assert policy.judge(f"{name}.weight", "BF16", (256, 256)).reason is None, name
    for name in kept.split():
        assert policy.judge(f"{name}.weight", "BF16", (256, 256)).reason is not None, name


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "words"),
    [
        ("x.bias", "BF16", (64,), "no weight of a layer"),
        ("x.weight", "BF16", (64,), "a vector"),
        ("x.weight", "BF16", (64, 4, 4), "no matrix"),
        ("x.weight", "I32", (64, 64), "stored as I32"),
        ("x.weight", "F64", (64, 64), "stored as F64"),
        ("x.weight", "BF16", (32, 4096), "a side shorter than 64"),
        ("x.weight", "BF16", (50, 64), "as many rows as the vocabulary"),
    ],
)
def test_what_is_no_linear_weight_stays(
    name: str, dtype: str, shape: tuple[int, ...], words: str
) -> None:
    config = {"model_type": "x", "text_config": {"vocab_size": 50}}

    assert LayerPolicy(config).judge(name, dtype, shape).reason == words


def test_embeddings_are_not_listed_as_linear_layers_and_heads_are() -> None:
    policy = LayerPolicy({"model_type": "llama"})

    assert not policy.judge("model.embed_tokens.weight", "BF16", (99, 64)).linear
    assert policy.judge("lm_head.weight", "BF16", (99, 64)).linear


def test_skip_and_only_narrow_the_table_and_unused_patterns_are_known() -> None:
    policy = LayerPolicy(
        {"model_type": "llama"}, skip=("*.layers.0.*", "nothing"), only=("mlp", "lm_head")
    )
    reasons = {
        name: policy.judge(f"{name}.weight", "BF16", (256, 256)).reason
        for name in ("a.layers.0.mlp.up", "a.layers.1.mlp.up", "a.layers.1.attn.q", "lm_head")
    }

    assert reasons == {
        "a.layers.0.mlp.up": "--skip *.layers.0.*",
        "a.layers.1.mlp.up": None,
        "a.layers.1.attn.q": "not among --only",
        "lm_head": "output head",
    }
    assert policy.unused_patterns == ["nothing"]


@pytest.mark.parametrize(
    ("name", "pattern", "found"),
    [
        ("model.lm_head", "lm_head", True),
        ("layers.0.mlp.gate_proj", "mlp.gate", False),
        ("layers.0.mlp.gate", "mlp.gate", True),
        ("layers.10.mlp", "*.1?.*", True),
        ("layers.10.mlp", "layers.1", False),
    ],
)
def test_patterns(name: str, pattern: str, found: bool) -> None:
    assert matches(name, pattern) is found


E, N, K = 3, 96, 64  # experts; rows and columns of gate and of up


def fused(folder: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Checkpoint:
    named = {f"layers.0.mlp.experts.{name}": tensor for name, tensor in tensors.items()}
    return Checkpoint.open(write_model(folder, named, config))


@pytest.mark.parametrize(
    ("kind", "transposed"),
    [
        ("llama4_text", True),
        ("qwen3_5_moe", False),
        ("qwen3_vl_moe", True),
        ("qwen3_vl_moe", False),
    ],
)
def test_each_expert_is_cut_out_as_its_matrix(tmp_path: Path, kind: str, transposed: bool) -> None:
    gate, up, down = torch.randn(E, N, K), torch.randn(E, N, K), torch.randn(E, K, N)
    config = {"model_type": kind, "hidden_size": K, "moe_intermediate_size": N}
    both = torch.cat([gate, up], dim=1)
    stored = (one.transpose(1, 2).contiguous() if transposed else one for one in (both, down))
    opened = fused(
        tmp_path, config, **dict(zip(("gate_up_proj", "down_proj"), stored, strict=True))
    )

    parts = {}
    for tensor in opened.tensors.values():
        assert is_fused(tensor)
        parts |= split(tensor, (kind,), config)

    assert len(parts) == 3 * E
    for expert in range(E):
        for name, whole in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            source = parts[f"layers.0.mlp.experts.{expert}.{name}"]
            assert source.shape == tuple(whole[expert].shape)
            assert torch.equal(source.read(0, source.shape[0]), whole[expert])
            assert torch.equal(source.read(5, 40), whole[expert][5:40])


@pytest.mark.parametrize(
    ("kind", "name", "shape", "config", "words"),
    [
        ("gpt_oss", "gate_up_proj", (E, K, 2 * N), {}, "must be known .* found gpt_oss"),
        ("mystery", "down_proj", (E, K, N), {}, "found mystery; keep it .* with --skip"),
        ("llama4", "w13", (E, K, N), {}, "holds fused experts"),
        ("llama4", "gate_up_proj", (E, K, 7), {}, "gate and up of equal size, found 7 rows"),
        ("qwen3_vl_moe", "down_proj", (E, K, N), {}, "found None and None"),
        (
            "qwen3_vl_moe",
            "down_proj",
            (E, 64, 64),
            {"hidden_size": 64, "moe_intermediate_size": 64},
            "told apart from their transpose",
        ),
    ],
)
def test_experts_of_unknown_layout_are_refused(
    tmp_path: Path, kind: str, name: str, shape: tuple[int, ...], config: Any, words: str
) -> None:
    opened = fused(tmp_path, {}, **{name: torch.zeros(shape)})
    (tensor,) = opened.tensors.values()

    with pytest.raises(CheckpointError, match=words) as caught:
        split(tensor, (kind,), config)
    assert_one_sentence(str(caught.value), "model.safetensors", tensor.name)
