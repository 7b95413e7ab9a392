"""`verify` finds what is wrong with a packed checkpoint, and `inspect` shows what is in it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import fp8dispatch
from fp8dispatch import cli
from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.layouts.catalog import LAYOUTS
from fp8dispatch.pack.scheme import SCHEMES
from tests.pack.folders import write_model
from tests.pack.packing import quantized, random_weight, restored, write_packed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

X, Y = "layers.0.q_proj", "layers.0.up_proj"
WEIGHTS = {X: random_weight(128, 256, 1), Y: random_weight(256, 256, 2)}
NORM = {"norm.weight": torch.linspace(0.5, 1.5, 5)}
SCHEME_OF = {
    "hf": "block128",
    "compressed-tensors": "tensor-static",
    "modelopt": "mxfp8",
    "fbgemm": "channel",
    "native": "group64",
}
SCALE_OF = {"hf": "weight_scale_inv"}


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Edit the tensors of a folder's only file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"{name}.weight": weight for name, weight in WEIGHTS.items()}
    return write_model(tmp_path / "source", {**tensors, **NORM})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_checkpoint_passes_with_the_sqnr_of_e4m3(
    layout: str, source: Path, tmp_path: Path
) -> None:
    scheme = SCHEMES[SCHEME_OF[layout]]
    folder = write_packed(tmp_path / "packed", WEIGHTS, layout, scheme, others=NORM)
    result = fp8dispatch.verify(folder, against=source)
    assert result.ok and result.failures == []
    for check in result.modules:
        weight = WEIGHTS[check.name].double()
        error = weight - restored(*quantized(WEIGHTS[check.name], scheme), scheme)
        sqnr = 10 * math.log10(float(weight.square().sum() / error.square().sum()))
        assert check.sqnr == pytest.approx(sqnr, abs=1e-3)
        assert check.max_error == pytest.approx(float(error.abs().max()), rel=1e-4)
    assert result.worst_sqnr is not None and result.worst_sqnr > 28
    assert fp8dispatch.verify(folder).ok
    assert not fp8dispatch.verify(folder, against=source, min_sqnr=60).ok


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "modelopt"])
def test_a_swapped_scale_convention_fails(layout: str, source: Path, tmp_path: Path) -> None:
    """448 / amax where amax / 448 belongs: against the source by its SQNR, which is negative, and
    without it by the size of the weights. Exit code 1."""
    scheme = SCHEMES[SCHEME_OF[layout]]
    folder = write_packed(tmp_path / "packed", WEIGHTS, layout, scheme, others=NORM)
    names = [f"{name}.{SCALE_OF.get(layout, 'weight_scale')}" for name in WEIGHTS]
    change(folder, lambda tensors: tensors.update({name: 1 / tensors[name] for name in names}))

    result = fp8dispatch.verify(folder, against=source)
    if layout == "native":  # its own record of the reciprocals is enough
        assert any("must be the reciprocal of" in text for text in result.failures)
        return
    assert all(check.sqnr is not None and check.sqnr < 0 for check in result.modules)
    assert all("the scales are the wrong way round" in text for text in result.failures)
    blind = fp8dispatch.verify(folder)
    assert len(blind.failures) == 2
    assert all("these look like 448 / amax; store their" in text for text in blind.failures)
    assert cli.main(["verify", str(folder), "--against", str(source)]) == 1


def nan_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{X}.weight"].view(torch.uint8)[3, 4] = 0x7F


def nan_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{X}.weight_scale"][0] = math.nan


def negative_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{X}.weight_scale"][7] = -1.0


def other_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] += 1


def lost_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["norm.weight"]


def cast_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].bfloat16()


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.9.bias"] = torch.zeros(3)


def shuffled(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{X}.weight"] = (
        tensors[f"{X}.weight"].view(torch.uint8).flip(0).view(torch.float8_e4m3fn)
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (nan_code, f"{X}.weight must hold finite codes, found 1 that mean NaN or infinity"),
        (nan_scale, f"{X}.weight_scale must hold positive finite scales, found 1 of 128"),
        (negative_scale, f"{X}.weight_scale must hold positive finite scales, found 1 of 128"),
        (other_norm, "norm.weight must hold the bytes of its source, found others"),
        (lost_norm, "must be in the packed model, found none"),
        (cast_norm, "norm.weight must be F32 [5] as in its source, found BF16 [5]"),
        (extra, "layers.9.bias must be in "),
        (shuffled, f"{X}.weight must restore its source with 28 dB, found -"),
    ],
)
def test_each_kind_of_damage_is_named(
    damage: Callable[[dict[str, torch.Tensor]], None], words: str, source: Path, tmp_path: Path
) -> None:
    folder = write_packed(tmp_path / "p", WEIGHTS, "ct", SCHEMES["channel"], others=NORM)
    result = fp8dispatch.verify(change(folder, damage), against=source)
    assert len(result.failures) == 1
    assert words in result.failures[0] and "; " in result.failures[0]


def test_configuration_and_index_must_agree_with_the_tensors(tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "p", WEIGHTS, "ct", SCHEMES["channel"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append(X)
    (folder / "config.json").write_text(json.dumps(config))
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    result = fp8dispatch.verify(folder)
    assert len(result.failures) == 2
    assert f"{X} must not be FP8" in result.failures[0]
    assert "must state the size of all tensors" in result.failures[1]


def test_a_source_that_is_another_model(source: Path, tmp_path: Path) -> None:
    folder = write_packed(
        tmp_path / "p",
        {X: random_weight(64, 64), "z": random_weight(8, 8)},
        "ct",
        SCHEMES["channel"],
    )
    texts = fp8dispatch.verify(folder, against=source).failures
    assert any("with shape [64, 64], found F32 [128, 256]; name" in text for text in texts)
    assert any("with shape [8, 8], found none of that name" in text for text in texts)


def test_fused_experts_are_compared_expert_by_expert(tmp_path: Path) -> None:
    """Llama-4 stores [E, K, N], gate before up; a packed model has a weight for each."""
    parent = "language_model.model.layers.0.feed_forward.experts"
    fused = torch.randn(2, 64, 96) * 0.02
    config = {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}
    source = write_model(tmp_path / "source", {f"{parent}.gate_up_proj": fused, **NORM}, config)
    weights = {}
    for expert in range(2):
        weights[f"{parent}.{expert}.gate_proj"] = fused[expert, :, :48].t().contiguous()
        weights[f"{parent}.{expert}.up_proj"] = fused[expert, :, 48:].t().contiguous()
    folder = write_packed(tmp_path / "p", weights, "native", SCHEMES["channel"], others=NORM)
    result = fp8dispatch.verify(folder, against=source)
    assert result.ok and len(result.modules) == 4
    lost = write_packed(
        tmp_path / "q", dict([*weights.items()][1:]), "native", SCHEMES["channel"], others=NORM
    )
    (failure,) = fp8dispatch.verify(lost, against=source).failures
    assert f"{parent}.gate_up_proj of " in failure and "must be in the packed model" in failure


def test_kv_scales_of_one_are_suspicious_and_zero_is_wrong(tmp_path: Path) -> None:
    folder = write_packed(
        tmp_path / "p", WEIGHTS, "ct", SCHEMES["channel"], kv_layers=("layers.0",)
    )
    assert fp8dispatch.verify(folder).warnings == []
    change(folder, lambda tensors: tensors.update({"layers.0.k_scale": torch.tensor(1.0)}))
    assert fp8dispatch.verify(folder).warnings == []  # the other one still says something
    change(folder, lambda tensors: tensors.update({"layers.0.v_scale": torch.tensor(0.5)}))
    assert fp8dispatch.verify(folder).warnings == []
    change(
        folder,
        lambda tensors: tensors.update(
            {f"layers.0.{kind}_scale": torch.tensor(1.0) for kind in "kv"}
        ),
    )
    result = fp8dispatch.verify(folder)
    assert result.ok and "lost the calibration" in result.warnings[0]
    change(folder, lambda tensors: tensors.update({"layers.0.k_scale": torch.tensor(0.0)}))
    (failure,) = fp8dispatch.verify(folder).failures
    assert "layers.0.k_scale must hold positive finite scales of the KV cache" in failure


def test_a_checkpoint_that_cannot_be_opened_fails_and_does_not_raise(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "p", NORM, {"model_type": "llama"})
    result = fp8dispatch.verify(folder)
    assert not result.ok and "not quantised" in result.failures[0]
    with pytest.raises(CheckpointError, match="existing folder or file"):
        fp8dispatch.verify(folder, against=tmp_path / "nothing")


def test_inspect_counts_scales_and_codes(tmp_path: Path) -> None:
    weight = torch.zeros(3, 64)
    weight[0, 0], weight[1, :2] = 448.0, torch.tensor([2.0, -2.0])
    folder = write_packed(tmp_path / "p", {X: weight}, "native", SCHEMES["channel"])

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{X}.weight"].view(torch.uint8)[2, 5] = 0xFF

    found = fp8dispatch.inspect(change(folder, edit))
    (facts,) = found.modules
    assert (found.layout, found.schemes) == ("native", {"row, dynamic activations": 1})
    # scales 1, 2 / 448 and, for the row of zeros, 1
    assert facts.scale_bins == found.scale_bins == {-8: 1, 0: 2}
    assert facts.scale_min == pytest.approx(2 / 448) and facts.scale_max == 1
    assert facts.full_codes == 3 / 192 and facts.zero_codes == 188 / 192
    assert (facts.nonfinite_codes, facts.bad_scales, facts.rms) == (1, 0, None)
    assert found.notes == ["1 of 1 modules have codes that mean NaN or infinity"]


def test_the_commands(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_packed(tmp_path / "p", WEIGHTS, "hf", SCHEMES["block128"], others=NORM)
    assert cli.main(["verify", str(folder), "--against", str(source)]) == 0
    assert "2 modules (hf): sound" in capsys.readouterr().out
    assert cli.main(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["failures"] == []
    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "format: hf" in shown and X in shown and "scales by power of two" in shown
    assert cli.main(["inspect", str(folder), f"{Y}.weight", "--json"]) == 0
    assert [fact["name"] for fact in json.loads(capsys.readouterr().out)["modules"]] == [Y]
    assert cli.main(["inspect", str(folder), "nothing"]) == 1
    assert "'nothing' must be a quantised module" in capsys.readouterr().err
