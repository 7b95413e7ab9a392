"""The linear layers of models by their configs, and sizes as they are written.

The configs are those that the makers published, cut to what matters; the expected shapes follow
from the parameter shapes of the published weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch.errors import CheckpointError, DTypeError, InvalidInputError, ShapeError
from fp8dispatch.tuning.shapes import FAMILIES, LARGEST, Size, model_shapes, parse_shapes

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}
LLAMA_3_70B = {
    **LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "tie_word_embeddings": True,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_hidden_layers": 61,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 27,
}
MIXTRAL_8X7B = {
    **LLAMA_3_8B,
    "model_type": "mixtral",
    "head_dim": None,
    "num_local_experts": 8,
}
QWEN2_MOE = {  # Qwen1.5-MoE-A2.7B
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 24,
    "num_experts": 60,
    "decoder_sparse_step": 1,
}
PHI_3_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
}
GEMMA_2_9B = {
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "num_hidden_layers": 42,
}

GATE, EXPERT, SHARED = (
    tuple(f"{prefix}{name}" for name in ("gate_proj", "up_proj"))
    for prefix in ("", "expert ", "shared ")
)

# Each shape (N, K) with the layers that have it.
EXPECTED: list[tuple[str, dict[str, Any], dict[tuple[int, int], tuple[str, ...]]]] = [
    (
        "Llama-3 8B",
        LLAMA_3_8B,
        {
            (4096, 4096): ("q_proj", "o_proj"),
            (1024, 4096): ("k_proj", "v_proj"),
            (14336, 4096): GATE,
            (4096, 14336): ("down_proj",),
        },
    ),
    (
        "Llama-3 70B",
        LLAMA_3_70B,
        {
            (8192, 8192): ("q_proj", "o_proj"),
            (1024, 8192): ("k_proj", "v_proj"),
            (28672, 8192): GATE,
            (8192, 28672): ("down_proj",),
        },
    ),
    (
        "Qwen3 4B, whose heads are wider than the hidden size",
        QWEN3_4B,
        {
            (4096, 2560): ("q_proj",),
            (1024, 2560): ("k_proj", "v_proj"),
            (2560, 4096): ("o_proj",),
            (9728, 2560): GATE,
            (2560, 9728): ("down_proj",),
        },
    ),
    (
        "Qwen3 30B-A3B, which has no dense layer",
        QWEN3_30B_A3B,
        {
            (4096, 2048): ("q_proj",),
            (512, 2048): ("k_proj", "v_proj"),
            (2048, 4096): ("o_proj",),
            (768, 2048): EXPERT,
            (2048, 768): ("expert down_proj",),
        },
    ),
    (
        "the same with one dense layer",
        {**QWEN3_30B_A3B, "mlp_only_layers": [0]},
        {
            (4096, 2048): ("q_proj",),
            (512, 2048): ("k_proj", "v_proj"),
            (2048, 4096): ("o_proj",),
            (6144, 2048): GATE,
            (2048, 6144): ("down_proj",),
            (768, 2048): EXPERT,
            (2048, 768): ("expert down_proj",),
        },
    ),
    (
        "DeepSeek-V3",
        DEEPSEEK_V3,
        {
            (1536, 7168): ("q_a_proj",),
            (24576, 1536): ("q_b_proj",),
            (576, 7168): ("kv_a_proj_with_mqa",),
            (32768, 512): ("kv_b_proj",),
            (7168, 16384): ("o_proj",),
            (18432, 7168): GATE,
            (7168, 18432): ("down_proj",),
            (2048, 7168): (*EXPERT, *SHARED),
            (7168, 2048): ("expert down_proj", "shared down_proj"),
        },
    ),
    (
        "DeepSeek-V2-Lite, whose queries have no low rank",
        DEEPSEEK_V2_LITE,
        {
            (3072, 2048): ("q_proj",),
            (576, 2048): ("kv_a_proj_with_mqa",),
            (4096, 512): ("kv_b_proj",),
            (2048, 2048): ("o_proj",),
            (10944, 2048): GATE,
            (2048, 10944): ("down_proj",),
            (1408, 2048): EXPERT,
            (2048, 1408): ("expert down_proj",),
            (2816, 2048): SHARED,
            (2048, 2816): ("shared down_proj",),
        },
    ),
    (
        "Mixtral 8x7B, whose intermediate size is an expert's",
        MIXTRAL_8X7B,
        {
            (4096, 4096): ("q_proj", "o_proj"),
            (1024, 4096): ("k_proj", "v_proj"),
            (14336, 4096): EXPERT,
            (4096, 14336): ("expert down_proj",),
        },
    ),
    (
        "Qwen1.5-MoE",
        QWEN2_MOE,
        {
            (2048, 2048): ("q_proj", "k_proj", "v_proj", "o_proj"),
            (1408, 2048): EXPERT,
            (2048, 1408): ("expert down_proj",),
            (5632, 2048): SHARED,
            (2048, 5632): ("shared down_proj",),
        },
    ),
    (
        "Phi-3 mini, whose projections are fused",
        PHI_3_MINI,
        {
            (9216, 3072): ("qkv_proj",),
            (3072, 3072): ("o_proj",),
            (16384, 3072): ("gate_up_proj",),
            (3072, 8192): ("down_proj",),
        },
    ),
    (
        "Gemma 2 9B",
        GEMMA_2_9B,
        {
            (4096, 3584): ("q_proj",),
            (2048, 3584): ("k_proj", "v_proj"),
            (3584, 4096): ("o_proj",),
            (14336, 3584): GATE,
            (3584, 14336): ("down_proj",),
        },
    ),
    (
        "a language model inside of one that sees",
        {"model_type": "mistral3", "vision_config": {}, "text_config": {**PHI_3_MINI}},
        {
            (9216, 3072): ("qkv_proj",),
            (3072, 3072): ("o_proj",),
            (16384, 3072): ("gate_up_proj",),
            (3072, 8192): ("down_proj",),
        },
    ),
]


def written(folder: Path, content: object) -> Path:
    path = folder / "config.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    ("config", "expected"), [case[1:] for case in EXPECTED], ids=[case[0] for case in EXPECTED]
)
def test_shapes_of_published_models(
    config: dict[str, Any], expected: dict[tuple[int, int], tuple[str, ...]], tmp_path: Path
) -> None:
    path = written(tmp_path, config)

    for given_path in (path, tmp_path, str(path)):
        found = {(one.n, one.k): one.layers for one in model_shapes(given_path)}
        assert found == expected


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_can_be_derived(kind: str, tmp_path: Path) -> None:
    """Of a config that has all sizes, each family gives attention and an MLP, and never lm_head."""
    everything = {**DEEPSEEK_V3, "vocab_size": 129280, "model_type": kind}

    found = model_shapes(written(tmp_path, everything))

    names = {name for one in found for name in one.layers}
    assert "o_proj" in names
    assert {"down_proj", "expert down_proj"} & names
    assert 129280 not in {one.n for one in found}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "must be well formed"),
        ("[]", "must be an object, found list"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ({}, "must follow from a model_type that is known here .* found 'None'; give its weights"),
        ({"model_type": "bert"}, "found 'bert'"),
        ({"model_type": ["llama"]}, "model_type that is known"),
        ({**LLAMA_3_8B, "hidden_size": "4096"}, "hidden_size must fit ModelConfig"),
        ({**LLAMA_3_8B, "hidden_size": -1}, "hidden_size must fit"),
        ({**LLAMA_3_8B, "hidden_size": 0}, "hidden_size must fit"),
        ({**LLAMA_3_8B, "hidden_size": 1 << 60}, "hidden_size must fit"),
        ({**LLAMA_3_8B, "num_hidden_layers": 1 << 40}, "num_hidden_layers must fit"),
        ({**LLAMA_3_8B, "num_attention_heads": 33}, "a multiple of num_attention_heads"),
        ({**LLAMA_3_8B, "head_dim": 1 << 23}, "q_proj must have at most 16777216"),
        ({**LLAMA_3_8B, "intermediate_size": None}, "a llama model needs intermediate_size"),
        ({**DEEPSEEK_V3, "v_head_dim": None}, "needs v_head_dim, found none"),
        ({**QWEN3_30B_A3B, "moe_intermediate_size": None}, "needs moe_intermediate_size"),
        ({**QWEN3_30B_A3B, "mlp_only_layers": "0"}, "mlp_only_layers must fit"),
        ({**QWEN3_30B_A3B, "decoder_sparse_step": 0}, "decoder_sparse_step must fit"),
        ({"model_type": "llama"}, "hidden_size must fit"),
        ('{"model_type": "llama", "hidden_size": NaN}', "the constant NaN"),
        ('{"x": ' * 100_000, "nested too deeply|well formed"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_sentence(
    content: object, sentence: str, tmp_path: Path
) -> None:
    path = written(tmp_path, content)

    with pytest.raises(CheckpointError, match=sentence) as error:
        model_shapes(path)

    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_there_or_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="must be readable"):
        model_shapes(tmp_path)
    with pytest.raises(CheckpointError, match="must be readable"):
        parse_shapes("no/such/config.json", [1])
    monkeypatch.setattr("fp8dispatch.tuning.shapes._MAX_CONFIG_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100 bytes"):
        model_shapes(written(tmp_path, LLAMA_3_8B))


def test_sizes_as_they_are_written(tmp_path: Path) -> None:
    small = {**PHI_3_MINI, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = written(tmp_path, {**small, "num_key_value_heads": 4})

    assert parse_shapes((1, 2, 3), [8]) == [Size(1, 2, 3)]
    assert parse_shapes("1,2,3", [8]) == [Size(1, 2, 3)]
    assert parse_shapes([(2, 3)], [8, 9]) == [Size(8, 2, 3), Size(9, 2, 3)]
    assert parse_shapes(["2, 3", "1,2,3", (1, 2, 3), [8, 2, 3]], [8]) == [
        Size(8, 2, 3),
        Size(1, 2, 3),
    ]
    assert parse_shapes([config, "7,96,32"], [5]) == [
        Size(5, 96, 32),  # qkv_proj and gate_up_proj
        Size(5, 32, 32),
        Size(5, 32, 48),
        Size(7, 96, 32),
    ]


@pytest.mark.parametrize(
    ("shapes", "tokens", "error", "sentence"),
    [
        ([], [1], ShapeError, "at least one"),
        ([(2, 3)], [], ShapeError, "need tokens, found none"),
        ([(1, 2, 3, 4)], [1], ShapeError, "a shape must be M,N,K"),
        ("5", [1], ShapeError, "a shape must be M,N,K"),
        ([(0, 2, 3)], [1], ShapeError, "between 1 and"),
        ([(1, 2, LARGEST + 1)], [1], ShapeError, "between 1 and"),
        ([(1, 2, 3.5)], [1], DTypeError, "must be an integer, found 3.5"),
        ([(1, 2, True)], [1], DTypeError, "must be an integer, found True"),
        ([(2, 3)], [0], ShapeError, "each of tokens must lie between"),
        ([(2, 3)], ["4"], DTypeError, "each of tokens must be an integer"),
        ([3.5], [1], ShapeError, "found 3.5"),
    ],
)
def test_what_is_no_size_is_refused(
    shapes: Any, tokens: Any, error: type[InvalidInputError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        parse_shapes(shapes, tokens)


@given(
    st.lists(st.lists(st.integers(1, LARGEST), min_size=2, max_size=3), min_size=1, max_size=5),
    st.lists(st.integers(1, LARGEST), min_size=1, max_size=4),
)
def test_every_size_once_in_the_order_given(shapes: list[list[int]], tokens: list[int]) -> None:
    expected: list[tuple[int, ...]] = []
    for shape in shapes:
        for m in tokens if len(shape) == 2 else shape[:1]:
            size = (m, *shape[-2:])
            expected += [] if size in expected else [size]

    texts = [",".join(map(str, shape)) for shape in shapes]
    for given_shapes in (shapes, texts):
        found = parse_shapes(given_shapes, tokens)  # type: ignore[arg-type]
        assert [(one.m, one.n, one.k) for one in found] == expected
