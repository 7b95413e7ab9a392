"""``fp8dispatch plan`` and ``fp8dispatch pack``: what they print, write and exit with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from fp8dispatch.cli import main
from fp8dispatch.pack import packing
from fp8dispatch.pack.summary import PackSummary, PlanSummary
from tests.pack.folders import files_of, write_model
from tests.pack.test_plan import CONFIG, llama

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A Llama of two layers."""
    return str(write_model(tmp_path / "in", llama(layers=2), CONFIG, shards=2))


def test_plan_prints_equal_layers_once_and_where_the_result_loads(
    source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["plan", source])

    words = capsys.readouterr().out
    assert code == 0
    (line,) = [line for line in words.splitlines() if "self_attn.q_proj" in line]
    assert " ".join(line.split()[1:6]) == "BF16 256 x 256 2"
    assert "keep: embedding" in words
    for where in ("transformers", "vllm", "fp8dispatch"):
        assert f"loads in {where}" in words


def test_plan_as_json_and_with_problems(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", source, "--json", "--recipe", "tensor-static", "--format", "ct"])

    summary = PlanSummary.model_validate_json(capsys.readouterr().out)
    assert code == 1
    assert "found no calibration" in summary.problems[0]
    assert summary.format == "compressed-tensors" and summary.files == {}


def test_pack_prints_the_plan_first_then_what_it_did(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["pack", source, str(tmp_path / "out"), "--preset", "cpu", "--workers", "1"])

    words = capsys.readouterr().out
    assert code == 0
    assert words.index("loads in fp8dispatch") < words.index("14 weights quantised")
    assert "dB SQNR over all weights; see" in words
    assert "fp8_report.md" in files_of(tmp_path / "out")


def test_pack_as_json_is_one_object(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["pack", source, str(tmp_path / "out"), "--json", "--no-report"])

    summary = PackSummary.model_validate(json.loads(capsys.readouterr().out))
    assert code == 0 and not summary.resumed and summary.totals is None
    sizes = {name: len(content) for name, content in files_of(tmp_path / "out").items()}
    assert summary.plan.files.items() <= sizes.items()


@pytest.mark.parametrize("flags", [["--dry-run"], ["--dry-run", "--json"]])
def test_a_dry_run_writes_nothing(
    source: str, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", source, str(tmp_path / "out"), *flags]) == 0
    assert "compressed-tensors" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_problems_are_printed_and_nothing_is_written(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["pack", source, str(tmp_path / "out"), "--skip", "no_such_layer"])

    assert code == 1
    assert "problem: --skip and --only must name layers" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--report", "r.json", "--no-report"], 2, "exclude each other"),
        (["--tp", "0"], 2, "tp must be at least 1"),
        (["--workers", "0"], 2, "workers must be at least 1"),
        (["--calibration", "nowhere.json"], 1, "nowhere.json"),
    ],
)
def test_usage_is_one_line_on_stderr(
    source: str,
    tmp_path: Path,
    flags: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pack", source, str(tmp_path / "out"), *flags]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "pack"])
def test_a_damaged_source_is_one_line_on_stderr(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 7)
    out = [str(tmp_path / "out")] if command == "pack" else []

    assert main([command, str(tmp_path / "model.safetensors"), *out]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_an_interrupt_can_be_resumed(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C between the files; the second run goes on and says so."""
    quantize, calls = packing.quantize_weights, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return quantize(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "quantize_weights", interrupted)
    assert main(["pack", source, str(tmp_path / "out")]) == 5
    assert "the same command goes on from here" in capsys.readouterr().err
    assert main(["pack", source, str(tmp_path / "out")]) == 0
    assert "resumed and finished" in capsys.readouterr().out
    assert len(calls) == 3, "the first file was not done again"


def test_names_from_a_file_are_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "in", {"[bold]x[/bold].weight": torch.ones(64, 64)})

    assert main(["plan", str(source)]) == 0
    assert "[bold]x[/bold].weight" in capsys.readouterr().out
