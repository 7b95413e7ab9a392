"""Scales of the KV cache in packed checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import fp8dispatch
from fp8dispatch import PackOptions, pack_checkpoint, plan_checkpoint
from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.calibration import Calibration
from tests.pack.folders import write_model
from tests.pack.test_packing import MODEL, SCALES, loaded
from tests.pack.test_plan import CONFIG

if TYPE_CHECKING:
    from pathlib import Path


ATTENTION = [f"model.layers.{layer}.self_attn" for layer in range(2)]
KV = Calibration({}, kv_scales=dict.fromkeys(ATTENTION, ((0.5, 0.25), (1.0, 2.0))))


@pytest.mark.parametrize(
    ("layout", "choice", "key", "keys", "values"),
    [
        ("compressed-tensors", "layer", "k_scale", [0.5], [2.0]),
        ("compressed-tensors", "head", "k_scale", [0.5, 0.25], [1.0, 2.0]),
        ("native", "head", "k_scale", [0.5, 0.25], [1.0, 2.0]),
    ],
)
def test_scales_of_the_kv_cache_are_written_beside_their_layer(
    tmp_path: Path, layout: str, choice: str, key: str, keys: list[float], values: list[float]
) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    done = pack_checkpoint(
        source,
        tmp_path / "out",
        PackOptions(recipe="channel", layout=layout, kv_scales=choice),
        calibration=KV,
        report=False,
    )

    packed = loaded(tmp_path / "out")
    for layer in ATTENTION:
        assert packed[f"{layer}.{key}"].flatten().tolist() == keys
        assert packed[f"{layer}.v_scale"].flatten().tolist() == values
    assert done.plan.contents.kv is not None
    assert fp8dispatch.inspect(tmp_path / "out") is not None


@pytest.mark.parametrize(
    ("calibration", "layout", "choice", "words"),
    [
        (None, "ct", "layer", "need a calibration that measured it, found none"),
        (SCALES, "ct", "layer", "need a calibration that measured it, found none"),
        (KV, "modelopt", "head", "one KV scale per layer"),
        (
            Calibration({}, kv_scales={"a": ((1.0,), (1.0,)), "b": ((1.0, 2.0), (1.0,))}),
            "ct",
            "head",
            r"equally many KV heads in all layers, found \[1, 2\]",
        ),
        (
            Calibration({}, kv_scales={"other.attn": ((1.0,), (1.0,))}),
            "ct",
            "layer",
            "'other.attn' must have tensors in the source",
        ),
    ],
)
def test_scales_of_the_kv_cache_that_cannot_be_written(
    tmp_path: Path, calibration: Calibration | None, layout: str, choice: str, words: str
) -> None:
    source = write_model(tmp_path, MODEL, CONFIG)
    options = PackOptions(recipe="channel", layout=layout, kv_scales=choice)

    with pytest.raises(CheckpointError, match=words):
        plan_checkpoint(source, options, calibration=calibration).refuse_problems()
