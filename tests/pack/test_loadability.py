"""Where a packed module loads: the rules of Transformers and vLLM, one case each.

The rules for Transformers were found by running it; `test_transformers` runs the same cases again
where Transformers is installed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from fp8dispatch.errors import InvalidInputError
from fp8dispatch.pack.layouts.contract import PackedModule
from fp8dispatch.pack.layouts.loadability import TARGETS, verdicts
from fp8dispatch.pack.layouts.sharding import Heads, fused_siblings, per_rank, split_of
from fp8dispatch.pack.scheme import SCHEMES, Activations, Scheme

A, M = "model.layers.0.self_attn", "model.layers.0.mlp"
BLOCK, CHANNEL = SCHEMES["block128"], SCHEMES["channel"]
GQA = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


def verdict(
    target: str,
    layout: str,
    scheme: Scheme,
    shape: tuple[int, int],
    name: str = f"{A}.o_proj",
    tp: int = 1,
) -> tuple[bool, str]:
    modules = {name: PackedModule(name, shape, scheme)}
    (found,) = verdicts(layout, modules, (), [target], tp)
    assert (found.target, found.module) == (target, name)
    return found.loads, found.reason


TRANSFORMERS = [
    ("hf", BLOCK, (384, 1536), True, ""),
    ("hf", BLOCK, (64, 128), True, ""),  # less than a block is a block
    ("hf", BLOCK, (192, 256), False, "reads blocks of 96 from 2 scales: wrong numbers without an"),
    ("hf", BLOCK, (256, 192), False, "K = 192 is no multiple of 128"),
    ("hf", BLOCK, (576, 128), False, "Transformers fails on 5 scales for it"),
    ("compressed-tensors", CHANNEL, (100, 77), True, ""),
    ("compressed-tensors", SCHEMES["tensor-static"], (100, 77), True, ""),
    ("compressed-tensors", BLOCK, (192, 256), True, ""),
    ("compressed-tensors", BLOCK, (256, 576), False, "fails when it groups the activations"),
    ("compressed-tensors", SCHEMES["mxfp8"], (64, 64), True, "needs dtype=torch.bfloat16"),
    ("fbgemm", CHANNEL, (100, 77), True, "needs a GPU of compute capability 9.0"),
    ("modelopt", SCHEMES["tensor-static"], (128, 128), False, "takes the codes for values"),
    ("native", CHANNEL, (128, 128), False, "does not know the native format"),
]


@pytest.mark.parametrize(("layout", "scheme", "shape", "loads", "words"), TRANSFORMERS)
def test_transformers(
    layout: str, scheme: Scheme, shape: tuple[int, int], loads: bool, words: str
) -> None:
    found, reason = verdict("transformers", layout, scheme, shape)
    assert found is loads
    assert words in reason if words else not reason


VLLM = [
    ("hf", BLOCK, (384, 1536), 1, True, ""),
    ("hf", BLOCK, (192, 256), 1, True, ""),  # alone and whole, its last block may be short
    ("hf", BLOCK, (256, 576), 1, False, "K = 576 is no multiple of 128"),
    ("hf", BLOCK, (256, 512), 8, False, "K = 64 on each of 8 ranks"),
    ("hf", BLOCK, (256, 516), 8, False, "cannot be split evenly over 8 ranks (row parallel)"),
    ("compressed-tensors", CHANNEL, (100, 80), 8, True, ""),
    ("compressed-tensors", SCHEMES["group64"], (128, 128), 1, False, "no FP8 weights in groups"),
    ("compressed-tensors", SCHEMES["mxfp8"], (128, 128), 1, True, "reads MXFP8"),
    (
        "compressed-tensors",
        replace(BLOCK, activations=Activations.NONE),
        (128, 128),
        1,
        False,
        "weight-only FP8 per tensor or channel",
    ),
    ("fbgemm", CHANNEL, (100, 80), 1, True, "--allow-deprecated-quantization"),
    ("modelopt", SCHEMES["tensor-static"], (100, 80), 1, True, ""),
    ("modelopt", CHANNEL, (100, 80), 1, True, "not run in vLLM"),
    ("native", CHANNEL, (128, 128), 1, False, "does not know the native format"),
]


@pytest.mark.parametrize(("layout", "scheme", "shape", "tp", "loads", "words"), VLLM)
def test_vllm(
    layout: str, scheme: Scheme, shape: tuple[int, int], tp: int, loads: bool, words: str
) -> None:
    found, reason = verdict("vllm", layout, scheme, shape, tp=tp)
    assert found is loads
    assert words in reason if words else not reason


def test_everything_that_exists_loads_here() -> None:
    for scheme in SCHEMES.values():
        assert verdict("here", "native", scheme, (77, 99)) == (True, "")
    expert = f"{M}.experts.0.up_proj"
    loads, remark = verdict("here", "native", BLOCK, (77, 99), expert)
    assert loads and "part of FP8Experts where the model stacks" in remark


def reasons(
    modules: dict[str, tuple[int, int]],
    *,
    tp: int = 1,
    skipped: tuple[str, ...] = (),
    scheme: Scheme = BLOCK,
    config: dict[str, int] | None = None,
) -> dict[str, str]:
    packed = {name: PackedModule(name, shape, scheme) for name, shape in modules.items()}
    found = verdicts("hf", packed, skipped, ["vllm"], tp, config)
    return {one.module.rpartition(".")[2]: one.reason for one in found if not one.loads}


def test_edges_of_fused_layers_must_be_edges_of_blocks() -> None:
    """q, k and v become one weight: all but the last need whole blocks."""
    shapes = {f"{A}.q_proj": (576, 256), f"{A}.k_proj": (192, 256), f"{A}.v_proj": (192, 256)}
    found = reasons(shapes)
    assert set(found) == {"q_proj", "k_proj"}
    assert "N = 576 is no multiple of 128, and it is cut or joined there" in found["q_proj"]
    # gate and up alike
    found = reasons({f"{M}.gate_proj": (256, 256), f"{M}.up_proj": (320, 256)})
    assert found == {}


def test_experts_need_whole_blocks_everywhere() -> None:
    shapes = {f"{M}.experts.3.{name}": (192, 256) for name in ("gate_proj", "up_proj")}
    assert set(reasons(shapes)) == {"gate_proj", "up_proj"}


def test_tensor_parallelism_cuts_columns() -> None:
    """512 rows on 4 ranks are whole blocks, on 8 they are not."""
    shapes = {f"{M}.gate_proj": (512, 256), f"{M}.up_proj": (512, 256)}
    assert reasons(shapes, tp=4) == {}
    assert set(reasons(shapes, tp=8)) == {"gate_proj", "up_proj"}


def test_few_kv_heads_are_kept_whole_on_each_rank() -> None:
    """8 heads of 128 on 16 ranks: one head each, a whole block; without the head count it would
    be half of one."""
    shapes = {
        f"{A}.q_proj": (4096, 4096),
        f"{A}.k_proj": (1024, 4096),
        f"{A}.v_proj": (1024, 4096),
    }
    assert reasons(shapes, tp=16, config=GQA) == {}
    assert set(reasons(shapes, tp=16)) == {"k_proj", "v_proj"}


def test_fused_layers_are_quantised_together_or_not_at_all() -> None:
    shapes = {f"{A}.q_proj": (128, 128), f"{A}.k_proj": (128, 128)}
    found = reasons(shapes, skipped=(f"{A}.v_proj",))
    assert all(
        f"fuses it with {A}.v_proj, which is not quantised" in text for text in found.values()
    )
    assert set(found) == {"q_proj", "k_proj"}
    assert reasons(shapes, skipped=("lm_head",)) == {}


def test_fused_layers_need_one_scheme() -> None:
    modules = {
        f"{A}.q_proj": PackedModule(f"{A}.q_proj", (128, 128), CHANNEL),
        f"{A}.k_proj": PackedModule(f"{A}.k_proj", (128, 128), BLOCK),
    }
    found = verdicts("compressed-tensors", modules, (), ["vllm"])
    assert all(not one.loads and "another scheme" in one.reason for one in found)


def test_names_say_how_a_layer_is_split_and_fused() -> None:
    assert split_of(f"{A}.q_proj") == "column"
    assert split_of(f"{A}.o_proj") == "row"
    assert split_of("encoder.layer.0.intermediate.dense") == "column"
    assert split_of("encoder.layer.0.attention.output.dense") == "row"
    assert split_of(f"{A}.kv_a_proj_with_mqa") == "whole"
    assert fused_siblings(f"{A}.k_proj") == tuple(f"{A}.{name}_proj" for name in "qkv")
    assert fused_siblings("w3") == ("w1", "w3")
    assert fused_siblings(f"{A}.o_proj") == ()
    assert per_rank(f"{A}.q_proj", (100, 64), 8, None) is None
    assert Heads.of({"text_config": {**GQA, "head_dim": 64}}) == Heads(8, 64)
    assert Heads.of({"hidden_size": 64}) is None


def test_wrong_arguments() -> None:
    assert TARGETS == ("transformers", "vllm", "here")
    with pytest.raises(InvalidInputError, match=r"some of transformers, vllm, here .* found tpu"):
        verdicts("hf", {}, (), ["tpu"])
    with pytest.raises(InvalidInputError, match="found tp=0"):
        verdicts("hf", {}, (), tp=0)
