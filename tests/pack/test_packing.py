"""Packing: right bytes in every format and cut, and whole files or none."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import fp8dispatch
from fp8dispatch import PackOptions, pack_checkpoint, plan_checkpoint
from fp8dispatch.errors import CheckpointError, InvalidInputError, NumericalOverflowError
from fp8dispatch.formats import decode_scale
from fp8dispatch.pack import packing, quantizing
from fp8dispatch.pack.calibration import Calibration
from fp8dispatch.pack.layouts.catalog import LAYOUTS
from fp8dispatch.pack.scheme import SCHEMES
from tests.pack.folders import assert_one_sentence, files_of, same_bytes, write_model
from tests.pack.test_checkpoint import hub_cache
from tests.pack.test_plan import CONFIG, Q_PROJ, llama, modules_of

if TYPE_CHECKING:
    from pathlib import Path

MODEL = llama(layers=2)
SCALES = Calibration(
    {name: 0.01 * (number + 1) for number, name in enumerate(modules_of(MODEL))},
    amax_history={Q_PROJ: (3.5, 2.0)},
    saturation={Q_PROJ: 99.0},
)
SCALE_NAMES = {
    "compressed-tensors": "weight_scale",
    "hf": "weight_scale_inv",
    "modelopt": "weight_scale",
    "fbgemm": "weight_scale",
    "native": "weight_scale",
}
COMBINATIONS = [
    *(("native", recipe) for recipe in SCHEMES),
    *(
        ("compressed-tensors", recipe)
        for recipe in ("channel", "tensor-static", "block128", "mxfp8")
    ),
    *(("hf", recipe) for recipe in ("block128", "block128-ue8m0")),
    *(("modelopt", recipe) for recipe in ("tensor-static", "channel", "mxfp8")),
    ("fbgemm", "channel"),
]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, as safetensors' own reader sees it."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(("layout", "recipe"), COMBINATIONS)
def test_the_bytes_are_those_of_quantize(tmp_path: Path, layout: str, recipe: str) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG, shards=2)
    scheme = SCHEMES[recipe]

    done = pack_checkpoint(
        source,
        tmp_path / "out",
        PackOptions(recipe=recipe, layout=layout),
        calibration=SCALES,
        report=False,
    )

    packed = loaded(tmp_path / "out")
    assert len(done.plan.weights) == 14
    for name, tensor in MODEL.items():
        module = name.removesuffix(".weight")
        if module not in done.plan.weights:
            assert same_bytes(packed.pop(name), tensor), name
            continue
        data, scale = fp8dispatch.quantize(
            tensor, scheme.recipe, scale_dtype=getattr(torch, scheme.scale_dtype)
        )
        assert same_bytes(packed.pop(name), data), name
        stored = packed.pop(f"{module}.{SCALE_NAMES[layout]}")
        assert same_bytes(stored.reshape(-1), scale.reshape(-1)), name
        if layout == "native":
            reciprocal = packed.pop(f"{module}.weight_scale_reciprocal")
            assert torch.equal(reciprocal, 1 / decode_scale(scale))
        if recipe == "tensor-static":
            key = "activation_scale" if layout == "native" else "input_scale"
            assert float(packed.pop(f"{module}.{key}")) > 0
    assert not packed, "nothing else is written"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_configuration_comes_with_the_models_own(tmp_path: Path, layout: str) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    done = pack_checkpoint(
        source, tmp_path / "out", PackOptions(layout=layout), calibration=SCALES, report=False
    )

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert config["quantization_config"] == done.plan.resolved.layout.config(done.plan.contents)


def test_fnuz_export_has_no_nan_byte(tmp_path: Path) -> None:
    """In FNUZ the byte 0x80, which is minus zero elsewhere, is NaN."""
    tensors = {"a.weight": torch.randn(128, 128) * 1e-3}
    tensors["a.weight"][0] = -0.0
    tensors["a.weight"][1] = -1e-30
    source = write_model(tmp_path / "in", tensors)

    pack_checkpoint(source, tmp_path / "out", PackOptions(preset="amd"), report=False)

    weight = loaded(tmp_path / "out")["a.weight"]
    assert weight.dtype == torch.float8_e4m3fnuz
    assert not (weight.view(torch.uint8) == 0x80).any()
    assert float(weight.float().abs().max()) == 240


@pytest.mark.parametrize("options", [{"recipe": "block128"}, {"recipe": "tensor-static"}, {}])
def test_workers_and_units_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG, shards=2)
    before = torch.get_num_threads()
    for workers, unit in ((1, 1 << 24), (3, 1), (2, 100_000)):
        monkeypatch.setattr(quantizing, "UNIT_BYTES", unit)
        out = tmp_path / str(workers)
        pack_checkpoint(source, out, PackOptions(**options), calibration=SCALES, workers=workers)

    assert files_of(tmp_path / "1") == files_of(tmp_path / "2") == files_of(tmp_path / "3")
    assert torch.get_num_threads() == before


def test_fused_experts_become_one_weight_each(tmp_path: Path) -> None:
    gate_up, down = torch.randn(2, 192, 256), torch.randn(2, 128, 192)
    tensors = {"l.experts.gate_up_proj": gate_up, "l.experts.down_proj": down}
    source = write_model(tmp_path / "in", tensors, {"model_type": "llama4"})

    pack_checkpoint(source, tmp_path / "out", PackOptions(preset="cpu", keep_master=True))

    packed = loaded(tmp_path / "out")
    for expert in range(2):
        for name, matrix in (
            ("gate_proj", gate_up[expert, :, :128].t()),
            ("up_proj", gate_up[expert, :, 128:].t()),
            ("down_proj", down[expert].t()),
        ):
            data, _ = fp8dispatch.quantize(matrix.contiguous(), "block", block_size=(1, 64))
            assert same_bytes(packed[f"l.experts.{expert}.{name}.weight"], data)
    masters = load_file(tmp_path / "out" / "master" / "model.safetensors")
    assert same_bytes(masters["l.experts.gate_up_proj"], gate_up)


def test_what_belongs_to_the_model_is_copied_and_the_source_untouched(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_bytes(b"x")
    before = files_of(source)

    pack_checkpoint(source, tmp_path / "out", report=False)

    assert files_of(source) == before
    assert {*files_of(tmp_path / "out")} == {*before} - {"pytorch_model.bin"}


def test_a_hub_cache_is_packed(tmp_path: Path) -> None:
    model = hub_cache(tmp_path, {"x.weight": torch.randn(64, 64), "y.weight": torch.randn(64, 64)})

    pack_checkpoint(model, tmp_path / "out", report=False)

    assert loaded(tmp_path / "out")["x.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("recipe", ["block128", "tensor-static", "channel"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_before_its_file_is_there(
    tmp_path: Path, recipe: str, value: float
) -> None:
    tensors = {**MODEL, "bad.weight": torch.randn(128, 128)}
    tensors["bad.weight"][100, 100] = value
    source = write_model(tmp_path / "in", tensors, CONFIG)

    with pytest.raises(NumericalOverflowError) as caught:
        pack_checkpoint(
            source,
            tmp_path / "out",
            PackOptions(recipe=recipe, layout="native"),
            calibration=Calibration({**SCALES.activation_scales, "bad": 0.1}),
        )

    assert_one_sentence(str(caught.value), source / "model.safetensors", "'bad.weight'", "--skip")
    assert not [name for name in files_of(tmp_path / "out") if name.endswith("safetensors")]
    done = pack_checkpoint(source, tmp_path / "out", PackOptions(skip=("bad",)), force=True)
    assert done.report is not None


def test_a_source_that_shrinks_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)
    planned = plan_checkpoint(source)
    os.truncate(source / "model.safetensors", 70_000)

    with pytest.raises(CheckpointError, match="the file was changed while it was read"):
        packing.carry_out(planned, tmp_path / "out")


def test_workers_below_one_are_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    with pytest.raises(InvalidInputError, match="workers must be at least 1, found 0"):
        pack_checkpoint(source, tmp_path / "out", workers=0)


def test_a_scheme_of_another_dtype_reaches_the_file(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)
    options = PackOptions(recipe="group32", dtype="float8_e4m3fnuz")

    done = pack_checkpoint(source, tmp_path / "out", options, report=False)

    scheme = replace(SCHEMES["group32"], dtype="float8_e4m3fnuz")
    assert {one.module.scheme for one in done.plan.weights.values()} == {scheme}
