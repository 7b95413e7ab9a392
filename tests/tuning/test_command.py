"""``fp8dispatch tune``: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8dispatch import cli
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.tuning import run as running
from tests.tuning.conftest import Workbench


@pytest.fixture
def timed(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """The command on the CPU, with the clock of the planted backends."""
    monkeypatch.setattr(running, "default_timer", lambda _: bench.timer)
    bench.plant("swift", 10.0)
    return bench


def tune(*arguments: str) -> int:
    return cli.main(["tune", "--device", "cpu", *arguments])


def test_the_report_is_a_table(timed: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    code = tune("--shapes", "3,24,160", "16,160", "--tokens", "1,100")

    out = capsys.readouterr().out
    assert code == 0
    rows = [line.split() for line in out.splitlines() if "swift" in line]
    cells = [[word for word in row if word not in ("│", "┃", "|")] for row in rows]
    assert [row[:3] for row in cells] == [
        ["3", "24", "160"],
        ["1", "16", "160"],
        ["100", "16", "160"],
    ]
    assert [row[-5:] for row in cells] == [["swift", "10.0", "eager", "100.0", "10.00"]] * 3
    assert re.search(r"kept in: .*tuned.*\.json", out)


def test_as_json_with_progress_in_lines(
    timed: Workbench, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    code = tune("--json", "--shapes", "3,24,160", "4,24,160", "--recipe", "row")

    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert code == 0
    assert [(one["m"], one["n"], one["k"]) for one in report["points"]] == [
        (3, 24, 160),
        (4, 24, 160),
    ]
    first = report["points"][0]
    assert (first["recipe"], first["order"], first["before"]) == (
        "row",
        ["swift", "eager"],
        "eager",
    )
    assert Path(report["file"]).parent == home / "tuned"
    steps = [json.loads(line) for line in captured.err.splitlines()]
    assert [(one["done"], one["of"]) for one in steps] == [(0, 2), (1, 2), (2, 2)]


def test_wrong_numbers_are_told_and_have_their_own_exit_code(
    timed: Workbench, capsys: pytest.CaptureFixture[str]
) -> None:
    timed.plant("broken", 1.0, fault=lambda out, *rest: out * (1 + (rest[-1].n == 24)))

    assert tune("--shapes", "3,24,160") == 4

    assert "broken, wrong: from column 0 on, row" in capsys.readouterr().out


def test_a_size_that_nobody_ran_fails(timed: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune("--shapes", "3,24,160", "--backends=-swift,-eager") == 1


def test_without_a_gpu_it_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert cli.main(["tune", "--shapes", "3,24,160"]) == 3

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "tune needs a CUDA GPU to measure on, torch finds none\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shapes", "3,24"], ""),  # N,K is fine: the device is what is wrong below
        (["--shapes", "3,24,160", "--device", "cuda:x"], "device must be a CUDA device"),
        (["--shapes", "3,0,160"], "M, N and K of a shape must lie between 1"),
        (["--shapes", "3"], "a shape must be M,N,K"),
        (["--shapes", "no-such-model"], "must be readable"),
        (["--shapes", "3,24,160", "--recipe", "column"], "--recipe must be"),
        (["--shapes", "24,160", "--tokens", "1,,2"], "--tokens must be integers"),
        (["--shapes", "24,160", "--tokens", "0"], "each of tokens must lie between 1"),
        (["--shapes", "3,24,160", "--backends", "swiftest"], "found 'swiftest'"),
    ],
)
def test_usage_is_refused_with_one_sentence(
    timed: Workbench,
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not sentence:
        assert tune(*arguments, "--tokens", "2") == 0
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "--device" in arguments)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    assert tune(*arguments) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.strip()
    assert re.search(sentence, said)
    assert "\n" not in said


def test_without_shapes_argparse_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune"])
    assert stopped.value.code == 2
    assert "--shapes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 5, "interrupted; the sizes measured so far are kept"),
        (BackendUnavailableError("the CUDA context is lost"), 1, "the CUDA context is lost"),
    ],
)
def test_what_ends_it_early(
    timed: Workbench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    sentence: str,
) -> None:
    def ends(*_: Any) -> None:
        raise error

    monkeypatch.setattr(running, "measure", ends)

    assert tune("--shapes", "3,24,160") == code

    assert sentence in capsys.readouterr().err


def test_usage_is_refused_before_torch_is_imported() -> None:
    code = (
        "import sys; from fp8dispatch.cli import main; "
        "code = main(['tune', '--shapes', '1,2,3', '--recipe', 'column']); "
        "sys.exit(code if 'torch' not in sys.modules else 70)"
    )

    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )

    assert ran.returncode == 2, ran.stderr


def test_a_bar_is_drawn_on_a_terminal(timed: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    import fp8dispatch

    fp8dispatch.tune((3, 24, 160), device="cpu", timer=timed.timer, progress=True)
    assert "tuning" in capsys.readouterr().err
    fp8dispatch.tune((3, 24, 160), device="cpu", timer=timed.timer, progress=False)
    assert capsys.readouterr().err == ""
