"""Every suite runs on a CPU: tiny, for no figure, so that nothing is misspelt on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8dispatch
from bench import __main__ as entry
from bench.session import Budget, Session, run
from bench.suites import SUITES, TOOLS
from bench.timing import Timer

OWN_WAY = [name for name, suite in SUITES.items() if suite.where == "cpu"]
REHEARSED = [name for name in SUITES if name not in (*OWN_WAY, "coldstart", "import")]
# Some points say it all; what each suite keeps for every point.
FEW = {"linear": 5, "gemm": 3, "decode": 2, "host": 2, "numerics": 2, "quantise": 6, "compile": 1}
KEPT = {
    "linear": {"recipe", "accuracy", "name", "chosen", "route", "selectable", "eager", "graph"},
    "gemm": {"recipe", "m", "n", "k", "us", "spread_us", "tflops", "refused"},
    "decode": {"cold", "warm", "whole, cold", "copies", "weight_bytes"},
    "quantise": {"part", "m", "k", "us", "spread_us"},
    "gradient": {"us", "spread_us", "refused"},
    "memory": {"bytes", "prepared_bytes", "forward_peak_bytes", "backward_peak_bytes"},
    "compile": {"device", "wall", "chosen"},
    "host": {"backend", "recipe"},
    "experts": {"way", "experts", "us", "spread_us", "tflops"},
    "experts_layer": {"model", "tokens", "rows_per_expert", "eager", "device"},
    "experts_numerics": {"recipe", "experts", "found", "refused"},
    "hopper": {"kinds"},
}


@pytest.fixture
def session() -> Session:
    # Not our kernels, which Triton's interpreter would run here; one that refuses is among them.
    return Session(Timer(), rounds=1, backends=("eager", "deepgemm"))


def rehearse(name: str, session: Session, out: Path, count: int) -> dict[str, Any]:
    module = import_module(SUITES[name].module)
    points = islice(module.points(session), count)
    summary = getattr(module, "summary", None)
    code = run(name, points, str(out), session, Budget(300), summary=summary)
    result: dict[str, Any] = json.loads(out.read_text())
    assert code == 0, result
    return result


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", REHEARSED)
def test_a_rehearsal_gives_right_numbers_and_whole_rows(
    name: str, session: Session, tmp_path: Path
) -> None:
    result = rehearse(name, session, tmp_path / "out.json", FEW.get(name, 3))

    assert result["rehearsal"] is True
    rows = [row for row in result[name] if row.get("part") != "ceilings"]
    assert rows
    for row in rows:
        assert KEPT.get(name, set()) <= set(row)
        assert "wrong" not in row and "failed" not in row


def test_every_suite_and_tool_is_there() -> None:
    for name, suite in SUITES.items():
        if name not in ("calibration", "pipeline"):  # those need packages that tests do without
            module = import_module(suite.module)
            assert hasattr(module, "points" if suite.where != "cpu" else "main"), name
    for module_name, _ in TOOLS.values():
        assert callable(import_module(module_name).main)
    listed = entry.listing()
    assert all(name in listed for name in (*SUITES, *TOOLS))


def test_the_list_and_a_suite_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(["--list"]) == 0
    assert "quantise" in capsys.readouterr().out
    out = tmp_path / "out.json"
    flags = ["--device", "cpu", "--rounds", "1", "--parts", "plain", "--budget", "100"]
    assert entry.main(["quantise", str(out), *flags]) == 0
    assert {row["part"] for row in json.loads(out.read_text())["quantise"]} == {"plain"}
    with pytest.raises(SystemExit):
        entry.main(["unknown"])


def test_a_rehearsal_never_lands_among_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not entry.default_out("linear", "cpu").startswith(str(entry.RESULTS))
    assert entry.default_out("pack") == str(entry.RESULTS / "cpu-pack.json")
    assert entry.default_out("import", "cpu") == str(entry.RESULTS / "cpu-import.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert entry.default_out("linear") == str(entry.RESULTS / "h200-linear.json")
    assert entry.default_out("pack") == str(entry.RESULTS / "cpu-pack.json")


def test_an_operator_that_is_wrong_is_named_and_not_timed(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fp8dispatch.fp8_linear

    def halved(*args: Any, **kwargs: Any) -> torch.Tensor:
        return right(*args, **kwargs) / 2

    monkeypatch.setattr(fp8dispatch, "fp8_linear", halved)
    module, out = import_module("bench.linear"), tmp_path / "out.json"

    code = run("linear", islice(module.points(session), 2), str(out), session, Budget(60))

    row = json.loads(out.read_text())["linear"][1]
    assert code == 1
    assert set(row["wrong"]) == {"eager", "automatic"}
    assert set(row["eager"]["us"]) == {"bf16"}


@pytest.mark.parametrize(
    ("name", "attribute", "planted"),
    [
        ("rms_norm", "rms_norm_quantize", lambda x, gain, *_, **more: (x * gain, more)),
        ("silu_mul", "silu_mul_quantize", lambda gate, up, **more: (gate * up, more)),
    ],
)
def test_a_fused_quantiser_that_is_wrong_is_named(
    name: str,
    attribute: str,
    planted: Callable[..., Any],
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fp8dispatch import QuantizedActivation

    def wrong(*args: Any, **kwargs: Any) -> QuantizedActivation:
        value, more = planted(*args, **kwargs)
        return QuantizedActivation.from_tensor(value, **more)

    monkeypatch.setattr(fp8dispatch, attribute, wrong)
    module: Any = import_module("bench.quantise")

    row = getattr(module, name)(session, 8, 256)

    assert set(row["us"]) == {"apart"}
    assert "is wrong" in row["wrong"]["fused"]


def test_experts_that_read_a_neighbours_weight_are_wrong(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fp8dispatch.fp8_experts_batched

    def neighbour(x: Any, weight: Any, scale: Any, ids: Any, **more: Any) -> torch.Tensor:
        return right(x, weight.roll(1, 0), scale.roll(1, 0), ids, **more)

    monkeypatch.setattr(fp8dispatch, "fp8_experts_batched", neighbour)
    numerics: Any = import_module("bench.experts_numerics")
    matmuls: Any = import_module("bench.experts")
    session.backends = ("eager",)

    row = numerics.measure(session, fp8dispatch.recipe.ROW, 3)
    assert set(row["wrong"]) == {"eager, batched"}
    assert set(row["found"]) == {"eager, grouped"}
    row = matmuls.decode(session, 16, 128, 128, 2)
    assert set(row["wrong"]) == {"eager", "automatic"}
    assert set(row["us"]) == {"read"}


def test_rows_of_no_expert_must_be_zero(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fp8dispatch.fp8_experts_grouped

    def unwritten(*args: Any, **more: Any) -> torch.Tensor:
        out = right(*args, **more)
        out[-1] = 1e-3
        return out

    monkeypatch.setattr(fp8dispatch, "fp8_experts_grouped", unwritten)
    numerics: Any = import_module("bench.experts_numerics")
    session.backends = ("eager",)

    row = numerics.measure(session, fp8dispatch.recipe.ROW, 3)

    assert "a row of no expert is not zero" in row["wrong"]["eager, grouped"]


def test_lateness_takes_both_slacks_and_only_what_may_be_chosen() -> None:
    linear: Any = import_module("bench.linear")

    def loss(automatic: float, best: float, named: float = 1.0) -> tuple[float, bool]:
        figures = {
            name: linear.Figure(us, 0.0)
            for name, us in (("automatic", automatic), ("triton", best), ("fbgemm_tile", named))
        }
        row = linear.lateness(figures, ["triton"])
        return row["loss"], row["late"]

    assert loss(11.9, 10.0) == (1.19, False)  # within 2 us
    assert loss(103.0, 100.0) == (1.03, False)  # within 5 %
    assert loss(106.0, 100.0) == (1.06, True)


def test_the_crossing_of_both_ways_through_experts() -> None:
    layer: Any = import_module("bench.experts_layer")

    def row(rows: float, batched: float, grouped: float) -> dict[str, Any]:
        us = {"batched": batched, "grouped": grouped, "bf16": 1.0}
        return {"model": "m", "rows_per_expert": rows, "device": {"us": us}}

    rows = [row(0.5, 1, 2), row(1, 3, 2), row(2, 2, 3), row(4, 4, 3), row(8, 9, 4)]
    assert layer.crossings(rows) == {"m": 4}
    assert layer.crossings(rows[:3]) == {"m": None}
