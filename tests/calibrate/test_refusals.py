"""What ``fp8dispatch calibrate`` refuses: each time one sentence and exit code 2 or 3."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from tests.calibrate.conftest import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


def pickled(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "pickled"
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    (target / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    return target


def remote(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint whose configuration points to code of its own."""
    target = tmp_path / "remote"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "evil.Config"}, architectures=["Mine"])
    (target / "config.json").write_text(json.dumps(config))
    (target / "evil.py").write_text("raise SystemExit('the code of a checkpoint ran')")
    return target


def emptied(folder: Path, tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (pickled, "a pickle can run code, found pytorch_model.bin"),
        (remote, "without running its code"),
        (emptied, "must hold a config.json"),
    ],
)
def test_checkpoints_that_are_not_safe_or_not_there_are_refused(
    spoil: Callable[[Path, Path], Path],
    words: str,
    folder: Path,
    text: Path,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(spoil(folder, tmp_path), "--text", text, "-o", output) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (None, "t.txt", "No such file"),
        (b"\xff\xfe", "t.txt", "another encoding"),
        (b"\n \n", "t.txt", "must hold a sample"),
        (b'{"id": 1}', "t.jsonl", "line 1 of"),
        (b"not json", "t.jsonl", "must be a JSON string"),
        (b"[" * 100_000, "t.jsonl", "must be a JSON string"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(
    content: bytes | None,
    name: str,
    words: str,
    folder: Path,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(folder, "--text", path, "-o", output) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "calibrate needs MODEL_DIR and --text"),
        (("m", "--text", "t", "--merge", "x"), 2, "--merge takes files of statistics alone"),
        (("m", "--text", "t", "--percentile", "0"), 2, "above 0 and at most 100"),
        (("--merge", "none.json"), 2, "No such file"),
        pytest.param(
            ("m", "--text", "t", "--device", "cuda"),
            3,
            "torch finds none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: tuple[str, ...],
    code: int,
    words: str,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(*arguments, "-o", output) == code
    assert words in capsys.readouterr().err


def test_an_output_without_a_folder_is_refused_before_anything_runs(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(folder, "--text", text, "-o", tmp_path / "none" / "s.json") == 2
    assert "an existing folder" in capsys.readouterr().err
    for wrong in ("0", "-3"):
        with pytest.raises(SystemExit) as exit_:
            main(folder, "-n", wrong, "-o", "x")
        assert exit_.value.code == 2
