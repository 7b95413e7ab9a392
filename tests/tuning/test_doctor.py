"""The doctor shows tuned routes, follows them, and clears them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from fp8dispatch import policy, trust
from fp8dispatch.doctor import overrides
from fp8dispatch.doctor.collect import Call, collect
from fp8dispatch.doctor.devices import find_devices
from fp8dispatch.doctor.render import render
from fp8dispatch.doctor.report import ChoiceRecord, Report
from fp8dispatch.kernels.tile import Tile
from fp8dispatch.recipe import BLOCK_128
from fp8dispatch.tuning import orders
from fp8dispatch.tuning.store import TunedStore
from tests.doctor.conftest import H200, plant
from tests.tuning.conftest import start_anew
from tests.tuning.test_store import point

if TYPE_CHECKING:
    from tests.doctor.conftest import Plant

__all__ = ["plant"]  # a fixture, taken over as it is

SHAPE = {"n": 4096, "k": 7168}


def kept(home: Path, *ms: int, **fields: object) -> Path:
    """Tuned points of the planted machine, as NVML shows it."""
    (device,) = find_devices(machine=None, index=None, probe=False).devices
    fingerprint = orders.fingerprint_of(device.machine)
    path = TunedStore(home).path(fingerprint)
    for m in ms:
        values = {"m": m, "order": ("triton", "cublaslt"), **SHAPE, **fields}
        TunedStore(home).directory.mkdir(parents=True, exist_ok=True)
        TunedStore(home).add(fingerprint, (point(**values),))
    start_anew()
    return path


def choice(report: Report, m: int) -> ChoiceRecord:
    (found,) = (
        one
        for one in report.devices[0].routes
        if (one.recipe, one.m, one.n, one.k) == ("block 128x128", m, 4096, 7168)
    )
    return found


def text_of(report: Report) -> str:
    stream = io.StringIO()
    render(report, Console(file=stream, width=300, highlight=False))
    return stream.getvalue()


def test_tuned_routes_are_shown_and_followed(plant: Plant, home: Path) -> None:
    plant(H200)
    path = kept(home, 16, 4096)

    report = collect(call=Call(16, 4096, 7168, BLOCK_128))

    tuned = report.devices[0].tuned
    assert tuned is not None
    assert (tuned.routes, tuned.in_force, tuned.file) == (2, True, str(path))
    assert tuned.date == "2026-09-21"
    for m in (16, 4096):
        assert choice(report, m).backend == "triton"
        assert choice(report, m).route == f"tuned, {path}, 2026-09-21"
    assert not choice(report, 256).route.startswith("tuned")
    assert report.devices[0].call is not None
    assert report.devices[0].call.choice.route.startswith("tuned, ")
    assert report.cache.tuned_files == 1
    text = text_of(report)
    assert f"files of tuned routes: 1 in {home / 'tuned'}" in text
    assert f"tuned routes for cuda:0: 2 in force, the newest of 2026-09-21, {path}" in text
    assert report.exit_code == collect(machine="h200").exit_code


def test_the_tile_in_force_is_shown(
    plant: Plant, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    kept(home, 16, tiles={"triton": Tile(16, 64, 4, 6)})
    kept(home, 256, order=("cublaslt", "triton"), tiles={"triton": Tile(64, 64, 4, 6, 2)})

    report = collect(call=Call(16, 4096, 7168, BLOCK_128))

    assert choice(report, 16).tile == "16x64, 4 warps, 6 stages"
    assert choice(report, 256).tile == "", "of a backend that was not chosen"
    call = report.devices[0].call
    assert call is not None
    assert call.choice.tile == "16x64, 4 warps, 6 stages"
    assert "  tile: 16x64, 4 warps, 6 stages" in call.text
    text = text_of(report)
    assert ", triton 16x64, 4 warps, 6 stages\n" in text
    assert "64x64" not in text
    assert Report.model_validate_json(report.model_dump_json()) == report
    monkeypatch.setenv(policy.TUNED_VARIABLE, "0")
    policy.reload_environment()
    assert choice(collect(), 16).tile == ""


def test_what_computed_wrong_numbers_there_is_refused(plant: Plant, home: Path) -> None:
    plant(H200)
    kept(home, 16, order=("cublaslt",), wrong={"triton": "row 3 off"})

    report = collect(call=Call(16, 4096, 7168, BLOCK_128))

    call = report.devices[0].call
    assert call is not None
    assert call.choice.backend == "cublaslt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(policy.BACKEND_VARIABLE, "triton")
        policy.reload_environment()
        forced = collect(call=Call(16, 4096, 7168, BLOCK_128)).devices[0].call
    policy.reload_environment()
    assert forced is not None
    assert forced.choice.backend is None
    assert "tuning found row 3 off" in forced.assessments[0].refusals[0].sentence


def test_the_variable_that_turns_them_off_is_shown(
    plant: Plant, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    kept(home, 16)
    monkeypatch.setenv(policy.TUNED_VARIABLE, "0")
    policy.reload_environment()

    report = collect()

    tuned = report.devices[0].tuned
    assert tuned is not None
    assert (tuned.routes, tuned.in_force) == (1, False)
    assert not choice(report, 16).route.startswith("tuned")
    text = text_of(report)
    assert "1 turned off by FP8DISPATCH_TUNED" in text
    assert "FP8DISPATCH_TUNED=0" in text


def test_a_stale_file_is_a_note_and_no_illness(
    plant: Plant, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant(H200)
    kept(home, 16)
    healthy = collect()
    plant(H200, driver="590.0", versions={"torch": "2.11.1"})
    start_anew()

    report = collect()

    tuned = report.devices[0].tuned
    assert tuned is not None
    assert (tuned.routes, tuned.in_force, tuned.file) == (0, False, None)
    (note,) = [one for one in report.findings if "tuned" in one.sentence]
    assert note.level == "note"
    assert "run fp8dispatch tune again" in note.sentence
    assert report.exit_code == healthy.exit_code
    assert caplog.messages == [], "said once, as a finding"


def test_another_machine_has_no_tuned_routes(plant: Plant, home: Path) -> None:
    plant(H200)
    kept(home, 16)

    report = collect(machine="h200")

    assert report.devices[0].tuned is None
    assert not choice(report, 16).route.startswith("tuned")


def test_clearing_the_cache_clears_them(plant: Plant, home: Path) -> None:
    plant(H200)
    path = kept(home, 16)
    assert collect().devices[0].tuned is not None

    report = collect(clear_cache=True)

    assert not path.exists()
    assert (report.cache.tuned_files, report.cache.tuned_cleared) == (0, 1)
    tuned = report.devices[0].tuned
    assert tuned is not None
    assert tuned.routes == 0
    assert not choice(report, 16).route.startswith("tuned")


def test_what_cannot_be_cleared_is_degraded(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise PermissionError("as planted")

    monkeypatch.setattr(overrides.orders, "clear", refused)
    monkeypatch.setattr(trust, "clear_stored", lambda: 0)

    report = collect(machine="h100", clear_cache=True)

    assert report.exit_code == 1
    assert "the tuned routes in" in report.findings[0].sentence
    assert report.findings[0].sentence.endswith("as planted")


def test_no_torch_is_imported_to_show_them(home: Path) -> None:
    code = """
    import sys
    from fp8dispatch.doctor.devices import find_devices
    from fp8dispatch.doctor.collect import collect
    from fp8dispatch.tuning import orders
    from fp8dispatch.tuning.store import TunedPoint, TunedStore
    from fp8dispatch import policy
    machine = find_devices(machine=None, index=None, probe=False).devices[-1].machine
    store, fingerprint = TunedStore(policy.cache_directory()), orders.fingerprint_of(machine)
    values = dict(recipe="row", accuracy="exact", m=1, n=8, k=16, us={}, tuned_at=1e9)
    with store.turn(fingerprint):
        store.add(fingerprint, (TunedPoint(order=("eager",), **values),))
    (tuned,) = [one.tuned for one in collect().devices if one.tuned and one.tuned.routes]
    print(tuned.in_force, [name for name in ("torch", "triton", "numpy") if name in sys.modules])
    """
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}

    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
    )

    assert ran.stdout.strip() == "True []", ran.stderr
