"""A run keeps what it has: budgets, failures, hangs, and the file at every moment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.session import Budget, Point, Session, run
from bench.timing import Timer
from tests.bench.planted import Clock


def session() -> Session:
    return Session(Timer())


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_rows_machine_and_summary_are_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.json"
    points = [("one", lambda: {"us": {"a": 1}}), ("two", lambda: {"us": {"a": 2}})]

    code = run(
        "planted", points, str(out), session(), Budget(60), summary=lambda rows: {"n": len(rows)}
    )

    result = read(out)
    assert code == 0
    assert result["planted"] == [{"us": {"a": 1}}, {"us": {"a": 2}}]
    assert (result["n"], result["suite"], result["rehearsal"]) == (2, "planted", True)
    assert "torch" in result["machine"]["versions"]
    assert "running" not in result and "stopped" not in result


def test_the_budget_stops_before_a_point_and_says_so(tmp_path: Path) -> None:
    clock, out = Clock(), tmp_path / "out.json"

    def point() -> dict[str, Any]:
        clock.now += 6
        return {}

    points: list[Point] = [(f"point {number}", point) for number in range(5)]
    code = run("planted", points, str(out), session(), Budget(10, clock))

    result = read(out)
    assert code == 1
    assert len(result["planted"]) == 2
    assert result["stopped"] == "the budget of 10 s was spent before point 2"
    assert result["seconds"] == 12


def test_a_point_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> dict[str, Any]:
        raise ValueError("planted\nand more")

    out = tmp_path / "out.json"
    code = run("planted", [("bad", failing), ("good", dict)], str(out), session(), Budget(60))

    assert code == 1
    assert read(out)["planted"] == [{"label": "bad", "failed": "ValueError: planted"}, {}]
    assert "NOT RIGHT: bad: ValueError: planted" in capsys.readouterr().out


def test_a_wrong_arm_makes_the_run_fail_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"m": 1, "n": 2, "k": 3, "wrong": {"planted": "9.00 times the per-element bound"}}
    out = str(tmp_path / "out.json")

    assert run("planted", [("point", lambda: row)], out, session(), Budget(60)) == 1
    assert "9.00 times the per-element bound" in capsys.readouterr().out


def test_a_lost_cuda_context_ends_the_run(tmp_path: Path) -> None:
    def lost() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    out = tmp_path / "out.json"
    run("planted", [("bad", lost), ("never", dict)], str(out), session(), Budget(60))

    result = read(out)
    assert len(result["planted"]) == 1
    assert result["stopped"] == "the CUDA context was lost at bad"


def test_an_interrupted_run_leaves_its_rows_and_the_point_that_ran(tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    points: list[Point] = [("good", lambda: {"us": {}}), ("last", interrupted)]
    with pytest.raises(KeyboardInterrupt):
        run("planted", points, str(out), session(), Budget(60))

    assert read(out)["planted"] == [{"us": {}}]
    assert read(out)["running"] == "last"


def test_a_point_that_hangs_ends_the_process_and_leaves_the_rows_before_it(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = (
        "import sys\n"
        "from bench.session import Budget, Session, run\n"
        "from bench.timing import Timer\n"
        "def hang():\n"
        "    while True: pass\n"
        "run('planted', [('good', dict), ('hangs', hang)], sys.argv[1], Session(Timer()),\n"
        "    Budget(60), hang_seconds=0.3)\n"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=120
    )

    assert ended.returncode == 1
    assert "in hang" in ended.stderr  # where it hung
    assert read(out)["planted"] == [{}]
    assert read(out)["running"] == "hangs"


def test_points_are_made_one_by_one(tmp_path: Path) -> None:
    events: list[str] = []

    def points() -> Iterator[Point]:
        for number in range(2):
            events.append(f"made {number}")
            yield str(number), lambda number=number: {"ran": events.append(f"ran {number}")}

    run("planted", points(), str(tmp_path / "out.json"), session(), Budget(60))

    assert events == ["made 0", "ran 0", "made 1", "ran 1"]


def test_on_a_cpu_the_grid_is_tiny_and_the_session_a_rehearsal() -> None:
    made = Session(Timer(), grid="all", parts=("one",))

    assert made.rehearsal
    assert made.grid == "tiny"
    assert made.rounds == Timer.rounds
    assert made.takes("one") and not made.takes("other")
