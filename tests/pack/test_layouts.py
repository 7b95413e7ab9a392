"""Every border: what each format calls a tensor, its dtype and shape, and that it means q * s.

The expected names and shapes are written out from the formats' own documentation, so a change of
ours cannot change them too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch.errors import CheckpointError, InvalidInputError, ScaleValueError, ShapeError
from fp8dispatch.pack.layouts import codec
from fp8dispatch.pack.layouts.catalog import LAYOUTS, get_layout
from fp8dispatch.pack.layouts.contract import Contents, PackedModule, Role, StoredTensor
from fp8dispatch.pack.layouts.reading import TensorHeader, read_contents
from fp8dispatch.pack.packed import PackedCheckpoint, nonfinite_codes
from fp8dispatch.pack.scheme import FLOAT8_NAMES, SCHEMES, Activations, Scheme, parse_scheme
from fp8dispatch.recipe import Granularity, Recipe
from tests.pack.packing import (
    ACTIVATION_SCALE,
    pack_tensors,
    quantized,
    random_weight,
    restored,
    write_packed,
)

if TYPE_CHECKING:
    from pathlib import Path

X = "model.layers.0.mlp.up_proj"
BLOCK_WEIGHT_ONLY = replace(SCHEMES["block128"], activations=Activations.NONE)

# format, scheme -> tensors of a weight [256, 384]: name, dtype, shape
BORDERS: list[tuple[str, Scheme, dict[str, tuple[str, tuple[int, ...]]]]] = [
    ("hf", SCHEMES["block128"], {"weight_scale_inv": ("F32", (2, 3))}),
    ("hf", SCHEMES["block128-ue8m0"], {"weight_scale_inv": ("F8_E8M0", (2, 3))}),
    ("compressed-tensors", SCHEMES["channel"], {"weight_scale": ("F32", (256, 1))}),
    (
        "compressed-tensors",
        SCHEMES["tensor-static"],
        {"weight_scale": ("F32", (1,)), "input_scale": ("F32", (1,))},
    ),
    ("compressed-tensors", SCHEMES["block128"], {"weight_scale": ("F32", (2, 3))}),
    ("compressed-tensors", SCHEMES["group64"], {"weight_scale": ("F32", (256, 6))}),
    ("compressed-tensors", SCHEMES["mxfp8"], {"weight_scale": ("U8", (256, 12))}),
    ("fbgemm", SCHEMES["channel"], {"weight_scale": ("F32", (256, 1))}),
    (
        "modelopt",
        SCHEMES["tensor-static"],
        {"weight_scale": ("F32", ()), "input_scale": ("F32", ())},
    ),
    ("modelopt", SCHEMES["channel"], {"weight_scale": ("F32", (256,))}),
    ("modelopt", BLOCK_WEIGHT_ONLY, {"weight_scale": ("F32", (2, 1, 3, 1))}),
    ("modelopt", SCHEMES["mxfp8"], {"weight_scale": ("U8", (256, 12))}),
    (
        "native",
        SCHEMES["group32"],
        {"weight_scale": ("F32", (256, 12)), "weight_scale_reciprocal": ("F32", (256, 12))},
    ),
    (
        "native",
        SCHEMES["tensor-static"],
        {
            "weight_scale": ("F32", (1,)),
            "weight_scale_reciprocal": ("F32", (1,)),
            "activation_scale": ("F32", (1,)),
        },
    ),
]
IDS = [f"{layout}-{scheme}".replace(" ", "-") for layout, scheme, _ in BORDERS]


@pytest.mark.parametrize(("layout", "scheme", "expected"), BORDERS, ids=IDS)
def test_a_format_stores_these_tensors_and_reads_them_back_exactly(
    layout: str, scheme: Scheme, expected: dict[str, tuple[str, tuple[int, ...]]], tmp_path: Path
) -> None:
    weight = random_weight(256, 384)
    weight[:128, :128] = 0  # a block of zeros: its scale is 1
    folder = write_packed(tmp_path, {X: weight}, layout, scheme)
    packed = PackedCheckpoint.open(folder)

    stored = {
        name.removeprefix(f"{X}."): (tensor.dtype, tensor.shape)
        for name, tensor in packed.checkpoint.tensors.items()
    }
    assert stored == {"weight": ("F8_E4M3", (256, 384)), **expected}

    module = packed.contents.modules[X]
    assert packed.contents.layout == layout
    assert module.scheme == scheme
    assert packed.contents.skipped == ("lm_head",)
    codes, scale = quantized(weight, scheme)
    assert torch.equal(packed.weight_scale(module), scale)
    values = torch.cat([strip for _, strip in packed.values(module, torch.float32)])
    assert torch.equal(values.double(), restored(codes, scale, scheme).float().double())
    static = packed.activation_scale(module)
    if scheme.activations is Activations.STATIC:
        assert static is not None and static.tolist() == [ACTIVATION_SCALE]
    else:
        assert static is None


def test_the_scale_is_amax_over_448_and_multiplies() -> None:
    """The worked example: amax 896 in one block and 0.875 in the other, so the scales are 2
    and 1/512; a reader that divided would be wrong by a factor of four or of 262144."""
    weight = torch.zeros(128, 256)
    weight[3, 5], weight[7, 200] = 896.0, -0.875
    tensors, _ = pack_tensors({X: weight}, "hf", SCHEMES["block128"])
    assert tensors[f"{X}.weight_scale_inv"].tolist() == [[2.0, 1 / 512]]
    assert float(tensors[f"{X}.weight"][3, 5]) == 448
    assert float(tensors[f"{X}.weight"][7, 200]) == -448


def test_native_stores_both_directions_of_the_scale_by_name(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, {X: random_weight(64, 128)}, "native", SCHEMES["group64"])
    metadata = json.loads((folder / "fp8dispatch.json").read_text())
    assert metadata["scale"] == "value = data * scale" and metadata["scale_inv"] == "1 / scale"
    assert metadata["modules"][X] == {
        "format": "E4M3",
        "layout": "row-major [N, K]",
        "granularity": "block",
        "group_size": 64,
        "block_rows": 1,
        "scale": f"{X}.weight_scale",
        "scale_inv": f"{X}.weight_scale_reciprocal",
        "activations": "dynamic",
        "activation_scale": None,
        "amax_history": [3.5, 2.25],
    }
    packed = PackedCheckpoint.open(folder)
    assert packed.contents.modules[X].amax_history == (3.5, 2.25)
    scale = packed.checkpoint.read(f"{X}.weight_scale")
    reciprocal = packed.checkpoint.read(f"{X}.weight_scale_reciprocal")
    assert torch.equal(reciprocal, 1.0 / scale)


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        (scheme, shape)
        for scheme in (SCHEMES["block128"], SCHEMES["group64"], SCHEMES["channel"])
        for shape in ((192, 256), (100, 256), (192, 576))
    ],
    ids=str,
)
def test_ragged_edges_are_cropped_blocks(
    scheme: Scheme, shape: tuple[int, int], tmp_path: Path
) -> None:
    weight = random_weight(*shape)
    folder = write_packed(tmp_path, {X: weight}, "native", scheme)
    packed = PackedCheckpoint.open(folder)
    codes, scale = quantized(weight, scheme)
    values = torch.cat(
        [strip for _, strip in packed.values(packed.contents.modules[X], torch.float32)]
    )
    assert torch.equal(values.double(), restored(codes, scale, scheme).float().double())


# Layouts as others write them: config block, names and shapes of the scales, the scheme it means.
FOREIGN: dict[str, tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]], Scheme]] = {
    "DeepSeek-V3, which says ue8m0 of its activations": (
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        {"weight_scale_inv": ("F32", (2, 3))},
        SCHEMES["block128"],
    ),
    "Qwen with bf16 scales": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        {"weight_scale_inv": ("BF16", (2, 3))},
        replace(SCHEMES["block128"], scale_dtype="bfloat16"),
    ),
    "fp16 scales": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"weight_scale_inv": ("F16", (2, 3))},
        replace(SCHEMES["block128"], scale_dtype="float16"),
    ),
    "DeepSeek-V4's name": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"scale": ("F8_E8M0", (2, 3))},
        SCHEMES["block128-ue8m0"],
    ),
    "Mistral Large's name": (
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        {"qscale_weight": ("BF16", ()), "qscale_act": ("BF16", ())},
        replace(SCHEMES["tensor-static"], scale_dtype="bfloat16"),
    ),
    "AutoFP8": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"weight_scale": ("F32", (1,)), "input_scale": ("F32", (1,))},
        SCHEMES["tensor-static"],
    ),
    "Transformers per tensor": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        {"weight_scale_inv": ("F32", ()), "activation_scale": ("F32", ())},
        SCHEMES["tensor-static"],
    ),
    "no weight_block_size, as Transformers' default": (
        {"quant_method": "fp8"},
        {"weight_scale_inv": ("F32", (2, 3))},
        SCHEMES["block128"],
    ),
    "mxfp8": (
        {"quant_method": "mxfp8"},
        {"weight_scale_inv": ("U8", (256, 12))},
        SCHEMES["mxfp8"],
    ),
    "64x64 blocks": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"weight_scale_inv": ("F32", (4, 6))},
        Scheme(Recipe(Granularity.BLOCK, (64, 64))),
    ),
    "ModelOpt's newer FP8_PB_WO": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        {"weight_scale_inv": ("F32", (2, 3))},
        BLOCK_WEIGHT_ONLY,
    ),
    "fbgemm, one dimension": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        {"weight_scale": ("F32", (256,))},
        SCHEMES["channel"],
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_others_write_is_read(case: str) -> None:
    block, scales, scheme = FOREIGN[case]
    headers = {f"{X}.weight": TensorHeader("F8_E4M3", (256, 384))}
    headers |= {f"{X}.{name}": TensorHeader(*header) for name, header in scales.items()}
    contents = read_contents({"quantization_config": block}, {}, headers)
    assert contents.modules[X].scheme == scheme
    assert {tensor.name for tensor in contents.modules[X].tensors} == set(headers)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8]
)
def test_scales_of_every_dtype_become_the_same_multipliers(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.25, 2.0, 1.0], [0.5, 0.0625, 4.0]])
    exponents = torch.tensor([[125, 128, 127], [126, 123, 129]], dtype=torch.uint8)
    raw = {torch.uint8: exponents, torch.float8_e8m0fnu: exponents.view(torch.float8_e8m0fnu)}
    stored = StoredTensor(f"{X}.weight_scale_inv", Role.WEIGHT_SCALE, "any", (2, 3))
    module = PackedModule(X, (256, 384), SCHEMES["block128"], (stored,))
    assert torch.equal(
        codec.decode(module, Role.WEIGHT_SCALE, raw.get(dtype, values.to(dtype))), values
    )


def test_modelopt_is_found_by_its_own_file_too(tmp_path: Path) -> None:
    folder = write_packed(
        tmp_path, {X: random_weight(64, 64)}, "modelopt", SCHEMES["tensor-static"]
    )
    exported = json.loads((folder / "hf_quant_config.json").read_text())
    assert exported["quantization"] == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert PackedCheckpoint.open(folder).contents.modules[X].scheme == SCHEMES["tensor-static"]


def test_a_block_nested_in_the_text_configuration_is_found() -> None:
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    headers = {
        f"{X}.weight": TensorHeader("F8_E4M3", (128, 128)),
        f"{X}.weight_scale_inv": TensorHeader("F32", (1, 1)),
    }
    config = {"model_type": "vlm", "text_config": {"quantization_config": block}}
    assert list(read_contents(config, {}, headers).modules) == [X]


@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    name=st.sampled_from(sorted(SCHEMES)),
    activations=st.sampled_from(list(Activations)),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
)
def test_what_a_format_accepts_it_reads_back(
    layout: str, name: str, activations: Activations, n: int, k: int
) -> None:
    """From headers alone, for every shape: the same scheme, or at a size where two schemes are the
    same numbers, one with as many scales."""
    scheme = SCHEMES[name]
    if activations is Activations.STATIC and scheme.recipe.block_size is not None:
        return
    scheme = replace(scheme, activations=activations)
    form = get_layout(layout)
    if form.refuse(scheme, (n, k)):
        return
    module = PackedModule(X, (n, k), scheme)
    contents = Contents({X: module})
    headers = {
        tensor.name: TensorHeader(tensor.dtype, tensor.shape)
        for tensor in form.tensors(X, scheme, (n, k))
    }
    config = {"quantization_config": form.config(contents)}
    read = read_contents(config, form.extra_files(contents), headers).modules[X]
    assert read.scheme == scheme
    assert {tensor.name for tensor in read.tensors} == set(headers)


@pytest.mark.parametrize("name", FLOAT8_NAMES)
def test_every_fp8_format_has_a_native_form(name: str, tmp_path: Path) -> None:
    """FNUZ, as gfx942 multiplies it, and E5M2 keep their own codes and largest values."""
    dtype = getattr(torch, name)
    scheme = replace(SCHEMES["channel"], dtype=name)
    weight = random_weight(40, 72)
    packed = PackedCheckpoint.open(write_packed(tmp_path, {X: weight}, "native", scheme))
    assert packed.contents.modules[X].scheme == scheme
    assert packed.checkpoint.read(f"{X}.weight").dtype == dtype
    codes, scale = quantized(weight, scheme)
    limit = {"e4m3fn": 448, "e4m3fnuz": 240}.get(name.removeprefix("float8_"), 57344)
    assert float(codes.float().abs().max()) == limit
    values = torch.cat([s for _, s in packed.values(packed.contents.modules[X], torch.float32)])
    assert torch.equal(values.double(), restored(codes, scale, scheme).float().double())


@pytest.mark.parametrize("name", FLOAT8_NAMES)
def test_codes_that_are_no_number_are_counted(name: str) -> None:
    """Among all 256 codes of a format, as torch decodes them."""
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    assert nonfinite_codes(codes) == int((~torch.isfinite(codes.float())).sum())
    for code in codes:
        assert nonfinite_codes(code[None]) == int(not torch.isfinite(code.float()))


def test_encode_never_rounds() -> None:
    stored = StoredTensor("x.weight_scale", Role.WEIGHT_SCALE, "BF16", (2,))
    assert codec.encode(stored, torch.tensor([0.5, 0.25])).dtype == torch.bfloat16
    with pytest.raises(ScaleValueError, match=r"x\.weight_scale in BF16 would change the scales"):
        codec.encode(stored, torch.tensor([0.3, 0.25]))
    with pytest.raises(ScaleValueError, match="positive and finite, found"):
        codec.encode(stored, torch.tensor([0.0, 0.25]))
    with pytest.raises(ShapeError, match="holds 2 scales"):
        codec.encode(stored, torch.ones(3))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match="block128, channel, tensor-static"):
        parse_scheme("int4")
    with pytest.raises(InvalidInputError, match="format must be one of compressed-tensors, hf"):
        get_layout("gguf")
    with pytest.raises(InvalidInputError, match="static activations need"):
        replace(SCHEMES["block128"], activations=Activations.STATIC)
    with pytest.raises(InvalidInputError, match="scheme's dtype must be one of"):
        Scheme(SCHEMES["channel"].recipe, dtype="int8")
    with pytest.raises(CheckpointError, match="quant_method must be"):
        read_contents({"quantization_config": {"quant_method": "awq"}}, {}, {})
