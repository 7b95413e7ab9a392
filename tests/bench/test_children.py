"""What runs in processes of its own: imports, kernels that may hang, the first call."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from bench import coldstart, hopper, imports
from bench.session import Session
from bench.shapes import GRID
from bench.timing import Timer


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ('print(\'{"told": "right"}\')', "right"),
        ("import sys; sys.exit('planted')", "exit 1: planted"),
        ("", "no answer"),
        ("import os; os.abort()", "exit -6"),
    ],
)
def test_how_a_child_ends_is_told(code: str, told: str) -> None:
    assert hopper.finish(child(code), time.monotonic() + 60).startswith(told)


def test_a_child_that_hangs_is_killed_and_told() -> None:
    hanging = child("while True: pass")

    assert "a hang?" in hopper.finish(hanging, time.monotonic())
    assert hanging.returncode == -9


@pytest.mark.parametrize("m", [*hopper.GEMM_ROWS, *hopper.DECODE_ROWS])
def test_what_the_library_takes_is_among_the_kinds_that_are_timed(m: int) -> None:
    for weight in GRID:
        kinds = hopper.kinds_for(m, weight.n, weight.k, 132)
        assert hopper.chosen_kind(m, weight.n, weight.k, 132) in kinds
        assert set(kinds) <= set(hopper.SAFETY)  # each has run in a child before


def test_imports_are_timed_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        imports, "STEPS", {name: imports.STEPS[name] for name in ("python", "fp8dispatch")}
    )

    row = imports.measure(1)

    assert row["loads"] == {"python": [], "fp8dispatch": []}  # importing the package is cheap
    assert row["seconds"]["fp8dispatch"] > row["seconds"]["python"] >= 0
    assert 5e6 < row["peak_bytes"]["python"] <= row["peak_bytes"]["fp8dispatch"]


def test_what_is_loaded_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "STEPS", {"nothing": ""})
    monkeypatch.setattr(imports, "BEFORE", {"nothing": "import sys; sys.modules['numpy'] = sys"})

    assert imports.measure(1)["loads"] == {"nothing": ["numpy"]}


def test_the_first_result_in_a_fresh_process() -> None:
    session = Session(Timer(), rounds=1)
    label, measure = next(islice(coldstart.points(session), 1))

    row = measure()

    assert label == "first result, block"
    assert row["all stored"]["backend"] == "eager"
    assert row["weight bytes"] == 256 * 256
    assert row["nothing stored"]["first call"] > 0
    assert coldstart.summary([row])["first result, seconds"] == [row]


def test_sanitize_and_warm_say_that_they_need_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from bench import warm

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warm.main([]) == 3
    assert "needs a GPU" in capsys.readouterr().out
    found = warm.shapes()
    assert found == sorted(set(found), reverse=True)
    assert {(8192, 57344, 8192), (16, 576, 7168), (2, 7168, 2048)} <= set(found)


def test_results_of_children_survive_noise_on_stdout(tmp_path: Path) -> None:
    noisy = child("print('warning: planted'); print('{\"told\": \"right\"}')")

    assert hopper.finish(noisy, time.monotonic() + 60) == "right"
