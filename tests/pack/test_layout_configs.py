"""The configurations that formats write, what they refuse, and where KV scales lie.

The expected blocks are written out as readers document them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fp8dispatch.pack.layouts.catalog import get_layout
from fp8dispatch.pack.layouts.contract import Contents, KVScales, PackedModule, Role
from fp8dispatch.pack.layouts.reading import TensorHeader, read_contents
from fp8dispatch.pack.packed import PackedCheckpoint
from fp8dispatch.pack.scheme import SCHEMES, Activations, Scheme
from tests.pack.packing import random_weight, write_packed

if TYPE_CHECKING:
    from pathlib import Path

X = "model.layers.0.mlp.up_proj"
BLOCK_WEIGHT_ONLY = replace(SCHEMES["block128"], activations=Activations.NONE)

CONFIGURATIONS: dict[str, tuple[str, Scheme, dict[str, Any]]] = {
    "hf": (
        "hf",
        SCHEMES["block128"],
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "scale_fmt": "float",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
            "ignored_layers": ["lm_head", "model.layers.0.mlp.gate"],
        },
    ),
    "hf with E8M0 scales": (
        "hf",
        SCHEMES["block128-ue8m0"],
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
            "ignored_layers": ["lm_head", "model.layers.0.mlp.gate"],
        },
    ),
    "fbgemm": (
        "fbgemm",
        SCHEMES["channel"],
        {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
        },
    ),
    "modelopt": (
        "modelopt",
        SCHEMES["tensor-static"],
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "ignore": ["lm_head", "model.layers.0.mlp.gate"],
            "config_groups": {
                "group_0": {
                    "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
                    "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                    "targets": ["Linear"],
                }
            },
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        },
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_is_what_readers_expect(case: str) -> None:
    """Both skip keys of the HF form, an output head in every list, full names."""
    layout, scheme, expected = CONFIGURATIONS[case]
    kv = KVScales(("model.layers.0.self_attn",)) if layout == "modelopt" else None
    contents = Contents({X: PackedModule(X, (128, 128), scheme)}, ("model.layers.0.mlp.gate",), kv)
    assert get_layout(layout).config(contents) == expected


def test_several_schemes_become_groups_with_names() -> None:
    modules = {
        "a.q": PackedModule("a.q", (128, 128), SCHEMES["channel"]),
        "b.q": PackedModule("b.q", (128, 128), SCHEMES["channel"]),
        "c.q": PackedModule("c.q", (128, 128), SCHEMES["block128"]),
    }
    block = get_layout("ct").config(Contents(modules))
    groups = block["config_groups"]
    assert groups["group_0"]["targets"] == ["c.q"]
    assert groups["group_0"]["weights"]["strategy"] == "block"
    assert groups["group_1"]["targets"] == ["Linear"]
    assert groups["group_1"]["weights"]["strategy"] == "channel"
    headers = {f"{name}.weight": TensorHeader("F8_E4M3", (128, 128)) for name in modules}
    headers |= {f"{name}.weight_scale": TensorHeader("F32", (128, 1)) for name in ("a.q", "b.q")}
    headers["c.q.weight_scale"] = TensorHeader("F32", (1, 1))
    read = read_contents({"quantization_config": block}, {}, headers)
    assert {name: module.scheme for name, module in read.modules.items()} == {
        name: module.scheme for name, module in modules.items()
    }


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("compressed-tensors", ("{}.k_scale", "{}.v_scale")),
        ("modelopt", ("{}.k_proj.k_scale", "{}.v_proj.v_scale")),
        ("native", ("{}.k_scale", "{}.v_scale")),
    ],
)
def test_kv_scales_lie_where_vllm_looks_for_them(
    layout: str, names: tuple[str, str], tmp_path: Path
) -> None:
    attention = "model.layers.0.self_attn"
    scheme = SCHEMES["tensor-static"]
    folder = write_packed(
        tmp_path, {X: random_weight(64, 64)}, layout, scheme, kv_layers=(attention,)
    )
    packed = PackedCheckpoint.open(folder)
    assert packed.contents.kv is not None
    assert packed.contents.kv.layers == (attention,)
    found = {tensor.role: tensor.name for tensor in packed.contents.kv.tensors}
    wanted = [name.format(attention) for name in names]
    assert found == {Role.K_SCALE: wanted[0], Role.V_SCALE: wanted[1]}
    assert float(packed.checkpoint.read(wanted[0])) == 0.25


REFUSALS: list[tuple[str, Scheme, tuple[int, int], str]] = [
    ("hf", SCHEMES["channel"], (128, 128), "found row, dynamic"),
    ("hf", SCHEMES["group64"], (128, 128), "groups of 64"),
    ("hf", BLOCK_WEIGHT_ONLY, (128, 128), "always quantises activations"),
    ("hf", replace(SCHEMES["block128"], scale_dtype="uint8"), (128, 128), "found uint8"),
    ("hf", replace(SCHEMES["block128"], dtype="float8_e5m2"), (128, 128), "found float8_e5m2"),
    ("ct", SCHEMES["block128-ue8m0"], (128, 128), "groups of 32 only"),
    ("ct", SCHEMES["group64"], (128, 96), "K = 96 with groups of 64"),
    ("fbgemm", SCHEMES["block128"], (128, 128), "row scales with dynamic activations"),
    ("modelopt", SCHEMES["block128"], (128, 128), "found block 128x128, dynamic activations"),
    ("modelopt", BLOCK_WEIGHT_ONLY, (192, 128), "whole blocks of 128x128"),
    ("modelopt", SCHEMES["group64"], (128, 128), "found group 64"),
]


@pytest.mark.parametrize(
    ("layout", "scheme", "shape", "words"), REFUSALS, ids=[words for *_, words in REFUSALS]
)
def test_a_format_refuses_what_it_cannot_hold(
    layout: str, scheme: Scheme, shape: tuple[int, int], words: str
) -> None:
    sentences = get_layout(layout).refuse(scheme, shape)
    assert any(words in sentence for sentence in sentences)
    assert all("found" in sentence and "; use " in sentence for sentence in sentences)


@pytest.mark.parametrize("layout", ["hf", "modelopt"])
def test_one_configuration_states_one_scheme(layout: str) -> None:
    schemes = {
        "hf": (SCHEMES["block128"], SCHEMES["block128-ue8m0"]),
        "modelopt": (SCHEMES["channel"], SCHEMES["tensor-static"]),
    }[layout]
    modules = {
        str(number): PackedModule(str(number), (128, 128), scheme)
        for number, scheme in enumerate(schemes)
    }
    (sentence,) = get_layout(layout).refuse_contents(Contents(modules))
    assert "for the whole model, found" in sentence
