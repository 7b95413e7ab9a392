"""The text says what the data says, on any width, and the data survives its way through a file."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from fp8dispatch import registry
from fp8dispatch.doctor.__main__ import main
from fp8dispatch.doctor.collect import collect
from fp8dispatch.doctor.questions import Call
from fp8dispatch.doctor.render import render
from fp8dispatch.doctor.report import Report
from fp8dispatch.recipe import BLOCK_128
from tests.doctor.conftest import H200

if TYPE_CHECKING:
    from tests.doctor.conftest import Plant


def text_of(report: Report, width: int) -> str:
    stream = io.StringIO()
    render(report, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("name", ["h100", "b200", "rtx-4090", "mi300x", "cpu"])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_refusal_is_lost_on_any_width(name: str, width: int) -> None:
    report = collect(machine=name)

    text = text_of(report, width)

    seen = squeezed(text)
    device = report.devices[0]
    sentences = [
        reason.sentence
        for backend in (*device.backends, *device.experts)
        for reasons in (backend.refusals, *(one.refusals for one in backend.recipes))
        for reason in reasons
    ]
    sentences += [
        reason.sentence
        for choice in (*device.routes, *device.expert_routes)
        for one in choice.passed_over
        for reason in one.refusals
    ]
    assert sentences
    for sentence in sentences:
        assert squeezed(sentence) in seen, sentence
    commands = {one.install for one in report.libraries}
    lines = [line.rstrip() for line in text.splitlines() if line.strip() not in commands]
    assert max(map(len, lines)) <= width, "only a command to copy may be longer"
    for command in commands - {""}:
        assert f"    {command}\n" in text, "a command stands on one line"


def test_wrapped_sentences_keep_their_indent() -> None:
    lines = text_of(collect(machine="rtx-4090"), 60).splitlines()

    start = next(i for i, line in enumerate(lines) if line.startswith("  fbgemm needs"))
    section = lines[start : lines.index("", start)]
    assert len(section) > 20
    assert [line for line in section if not line.startswith("  ")] == []


@pytest.mark.parametrize("name", ["h100", "b200"])
def test_no_verdict_or_choice_is_lost_in_a_narrow_table(name: str) -> None:
    report = collect(machine=name)

    narrow, wide = text_of(report, 60), text_of(report, 200)

    for word in ("untested", "plain", "cublaslt", "triton", "4096", "4100", "1x128", "[1]"):
        assert narrow.count(word) == wide.count(word) > 0, word
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow


def test_devices_with_the_same_answers_share_their_tables(plant: Plant) -> None:
    plant(H200, H200)

    text = text_of(collect(), 110)

    assert text.count("Routes on cuda:0, cuda:1 (NVIDIA H200)") == 1
    assert text.count("Routes on") == 1


def test_route_evidence_and_who_decided_are_named(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    monkeypatch.setenv("FP8DISPATCH_BACKEND", "-cublaslt,-fbgemm")

    text = text_of(collect(), 110)

    assert "order: measured, bench/results/h200" in text
    assert "decided by FP8DISPATCH_BACKEND" in text
    assert re.search(r"environment +-cublaslt,-fbgemm +none +none +none +yes", text)


def test_one_call_is_explained_with_every_answer(plant: Plant) -> None:
    plant(H200)

    call = collect(call=Call(16, 4096, 7168, BLOCK_128)).devices[0].call

    assert call is not None
    assert (call.choice.backend, call.choice.m) == ("gluon", 16)
    assert len(call.assessments) == len(registry.NAMES)
    assert call.text.startswith("gluon runs M=16 N=4096 K=7168, block 128x128")


def test_one_call_has_the_recipe_that_its_scale_would_be_read_as() -> None:
    call = collect(machine="h100", call=Call(1, 64, 64, BLOCK_128)).devices[0].call

    assert call is not None
    assert call.choice.recipe == "tensor", "one block over all of the weight"


def test_report_survives_its_way_through_a_file(plant: Plant) -> None:
    plant(H200)
    report = collect(call=Call(0, 8, 8, BLOCK_128))

    assert Report.model_validate_json(report.model_dump_json()) == report


def test_json_is_the_whole_output(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant(H200)

    code = main(["--json"])

    captured = capsys.readouterr()
    assert code == 0
    assert captured.err == ""
    assert "\x1b" not in captured.out
    assert json.loads(captured.out)["schema_version"] == 3
    assert Report.model_validate_json(captured.out).status == "healthy"


def test_no_color_leaves_no_color_on_a_terminal(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(H200, versions={"triton": None, "torchao": None})
    color = re.compile(r"\x1b\[[0-9;]*\b3\d")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main([])
    assert color.search(capsys.readouterr().out), "else this test shows nothing"
    monkeypatch.setenv("NO_COLOR", "1")

    main([])

    assert not color.search(capsys.readouterr().out)
