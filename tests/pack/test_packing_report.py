"""The report of packing: figures of every weight, where they go, and the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8dispatch import PackOptions, pack_checkpoint
from fp8dispatch.pack.report import Report
from tests.pack.folders import write_model
from tests.pack.test_packing import MODEL, SCALES, loaded
from tests.pack.test_plan import CONFIG, Q_PROJ

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_report_is_of_every_weight(tmp_path: Path) -> None:
    tensors = {**MODEL, "spoilt.weight": torch.full((128, 128), 1e-9)}
    tensors["spoilt.weight"][0, 0] = 1000.0
    source = write_model(tmp_path / "in", tensors, CONFIG)

    done = pack_checkpoint(
        source, tmp_path / "out", PackOptions(recipe="block128"), calibration=SCALES
    )

    report = Report.model_validate_json((tmp_path / "out" / "fp8_report.json").read_text())
    assert report == done.report
    assert [one.name for one in report.tensors] == [f"{name}.weight" for name in done.plan.weights]
    assert report.totals.bytes_after == sum(t.nbytes for t in loaded(tmp_path / "out").values())
    figures = {one.name: one for one in report.tensors}
    assert figures.pop("spoilt.weight").flushed > 0.99
    assert all(31 < (one.sqnr_db or 99) < 32.5 for one in figures.values())
    assert figures[report.worst[0]].sqnr_db == min(one.sqnr_db or 99 for one in figures.values())
    assert report.activation_saturation == {Q_PROJ: 99.0}
    page = (tmp_path / "out" / "fp8_report.md").read_text()
    assert "lowest SQNR" in page and Q_PROJ in page
    assert (tmp_path / "out" / "fp8_report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_elsewhere_and_none(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    done = pack_checkpoint(source, tmp_path / "a", report=tmp_path / "r" / "mine.json")
    none = pack_checkpoint(source, tmp_path / "b", report=False)

    assert [path.name for path in done.report_files] == ["mine.json", "mine.md", "mine.png"]
    assert all(path.is_file() for path in done.report_files)
    assert none.report is None and not list(tmp_path.glob("[ab]/*report*"))


def test_without_matplotlib_the_picture_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8dispatch.pack.report_files.find_spec", lambda name: None)
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    done = pack_checkpoint(source, tmp_path / "out")

    assert (
        "needs matplotlib, found none installed; pip install 'fp8dispatch[plot]'" in done.notes[0]
    )
    assert not (tmp_path / "out" / "fp8_report.png").exists()
