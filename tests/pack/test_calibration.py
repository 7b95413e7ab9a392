"""The border between calibration and packing: its file becomes scales, histories and warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fp8dispatch import PackOptions, pack_checkpoint, plan_checkpoint
from fp8dispatch.calibrate import magnitudes, stats
from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.calibration import read_calibration
from tests.pack.folders import write_model
from tests.pack.test_plan import CONFIG, K_PROJ, Q_PROJ, llama, modules_of

if TYPE_CHECKING:
    from pathlib import Path

LAYER = "model.layers.0.self_attn"


def statistics(path: Path, complete: bool = True) -> Path:
    """Statistics of all linear layers, the inputs of k_proj ten times those of the others."""
    records = {}
    for name in modules_of(llama()):
        if "layers" in name and "norm" not in name:
            inputs = torch.full((4, 64), 4.48 * (10 if name == K_PROJ else 1))
            seen = magnitudes.Magnitudes.of(inputs)
            records[name] = stats.record_of(seen, 64, 1, [3.0, 4.48])
    kv = {LAYER: stats.KVRecord(key_amax=[4.48, 8.96], value_amax=[44.8, 0.0])}
    stats.CalibrationStats(modules=records, kv_cache=kv, complete=complete).save(path)
    return path


def test_a_file_of_statistics_becomes_scales(tmp_path: Path) -> None:
    found = read_calibration(statistics(tmp_path / "stats.json"), "float8_e4m3fn")

    assert found.activation_scales["model.layers.0.mlp.down_proj"] == pytest.approx(0.01)
    assert found.activation_scales[Q_PROJ] == pytest.approx(0.1), "fused with k_proj"
    assert found.amax_history["model.layers.0.mlp.down_proj"] == pytest.approx((4.48, 3.0))
    keys, values = found.kv_scales[LAYER]
    assert keys == pytest.approx((0.01, 0.02)) and values == pytest.approx((0.1, 1.0))


def test_it_packs_static_scales(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", llama(), CONFIG)
    options = PackOptions(
        recipe="tensor-static",
        layout="native",
        calibration=statistics(tmp_path / "stats.json"),
        kv_scales="head",
    )

    done = pack_checkpoint(source, tmp_path / "out", options)

    assert done.plan.weights[Q_PROJ].activation_scale == pytest.approx(0.1)
    assert done.plan.weights[Q_PROJ].module.amax_history
    assert done.report is not None and Q_PROJ in done.report.activation_saturation


@pytest.mark.parametrize("what", ["missing", "damaged", "incomplete"])
def test_a_file_that_cannot_be_used(tmp_path: Path, what: str) -> None:
    path = tmp_path / "stats.json"
    if what == "incomplete":
        statistics(path, complete=False)
    elif what == "damaged":
        path.write_text("{}x")
    source = write_model(tmp_path / "in", llama(), CONFIG)

    with pytest.raises(CheckpointError):
        plan_checkpoint(source, PackOptions(recipe="tensor-static", calibration=path))
