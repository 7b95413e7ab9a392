"""Names in files: experts are found where Transformers saves them, other layers where they are."""

from __future__ import annotations

import logging

import pytest
import torch

from fp8dispatch.calibrate import names as names_module
from fp8dispatch.calibrate.names import names_in_files, renamed
from fp8dispatch.calibrate.stats import CalibrationStats, KVRecord, ModuleRecord
from tests.calibrate.models import llama, mixtral

pytest.importorskip("transformers.core_model_loading")


def test_names_that_are_the_same_are_left_out() -> None:
    assert names_in_files(llama(), ["model.layers.0.self_attn"]) == {}


def test_every_experts_matrix_has_its_own_name() -> None:
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():  # weights that say whose they are
        for index in range(8):
            experts.gate_up_proj[index, :48] = index
            experts.gate_up_proj[index, 48:] = 100 + index
            experts.down_proj[index] = 200 + index
    names = names_in_files(model)

    from transformers.core_model_loading import revert_weight_conversion

    saved = revert_weight_conversion(model, model.state_dict())
    prefix = "model.layers.0.mlp.experts"
    for index in range(8):
        for part, value in (("gate_proj", 0), ("up_proj", 100), ("down_proj", 200)):
            weight = saved[names[f"{prefix}.{index}.{part}"] + ".weight"]
            assert weight.unique().tolist() == [value + index]


def test_statistics_are_renamed_whole() -> None:
    record = ModuleRecord(in_features=3)
    cache = KVRecord(key_amax=[1.0], value_amax=[1.0])
    stats = CalibrationStats(modules={"a": record, "b": record}, kv_cache={"c": cache})
    found = renamed(stats, {"a": "x", "c": "z"})
    assert (list(found.modules), list(found.kv_cache)) == (["x", "b"], ["z"])


def test_a_model_that_cannot_be_reverted_keeps_its_names_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import core_model_loading

    def broken(model: object, state: object) -> None:
        raise RuntimeError("no way back")

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", broken)
    with caplog.at_level(logging.WARNING, "fp8dispatch"):
        assert names_in_files(mixtral()) == {}
    assert "keep the names that they have in memory" in caplog.text
    monkeypatch.setattr(names_module, "find_spec", lambda name: None)
    assert names_in_files(mixtral()) == {}
