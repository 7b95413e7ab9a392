"""Calibrating an encoder with a decoder: both read the text, the decoder one token later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fp8dispatch.calibrate.observe import Calibrator
from fp8dispatch.calibrate.run import Plan, run_plan
from tests.calibrate.conftest import LINES, main
from tests.calibrate.models import save_checkpoint, t5, whisper

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(t5(), tmp_path_factory.mktemp("tiny") / "tiny-t5")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_statistics_are_those_of_a_training_step(
    folder: Path, text: Path, output: Path, batch_size: int
) -> None:
    """Of the model's own way to shift labels, one sample after the other: without padding."""
    result = run_plan(Plan(folder, text, output, samples=6, batch_size=batch_size, dtype="float32"))

    model = t5().float()
    with torch.no_grad(), Calibrator(model) as calibrator:
        for line in LINES[:6]:
            ids = torch.tensor([[ord(letter) for letter in line]])
            model(input_ids=ids, labels=ids)
    expected = calibrator.stats()
    assert expected.modules.keys() == result.stats.modules.keys()
    for name, record in expected.modules.items():
        found = result.stats.modules[name]
        assert found.values == record.values > 0, name
        assert found.amax == pytest.approx(record.amax, rel=1e-4), name
        assert not found.unmasked_calls


def test_the_cache_is_that_of_the_decoder(folder: Path, text: Path, output: Path) -> None:
    result = run_plan(Plan(folder, text, output, samples=2))

    assert list(result.stats.kv_cache) == [
        f"decoder.block.{layer}.layer.0.SelfAttention" for layer in range(2)
    ]
    assert all(len(record.key_amax) == 4 for record in result.stats.kv_cache.values())


def test_one_that_reads_no_text_is_refused(
    tmp_path: Path, text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(whisper(), tmp_path / "tiny-whisper")

    assert main(folder, "--text", text, "-o", output) == 2

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "needs to read text" in error and "found input_features" in error
    assert "run it yourself inside fp8dispatch.Calibrator" in error
    assert not output.exists()


def test_a_gguf_file_is_refused_with_the_way_to_convert_it(
    folder: Path, tmp_path: Path, text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    assert main(tmp_path, "--text", text, "-o", output) == 2

    error = capsys.readouterr().err.strip()
    assert "found model.gguf in" in error and "gguf_file='model.gguf'" in error
