"""Backends that must be named: what the doctor says of them, and that it leaves them untested."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fp8dispatch import policy, registry, trust
from fp8dispatch.doctor.collect import collect
from fp8dispatch.probes.gallery import NAMES
from fp8dispatch.trust import Verdict
from tests.doctor.conftest import H200

if TYPE_CHECKING:
    from fp8dispatch.doctor.report import BackendRecord, Report
    from tests.doctor.conftest import Plant

TILES = ("fbgemm_tile", "mslk_tile")
NAMED = ("weight_only", *TILES)

# Beside "opt-in", everywhere. Their kernels are SM90's alone (facts of FBGEMM's sources: no other
# architecture is built for f8f8bf16_blockwise); the ROCm machine has neither library.
CODES = {
    "h100": (),
    "h200": (),
    "mi300x": ("version", "rocm"),
    "cpu": ("version", "capability"),
}


def tiles_of(report: Report) -> dict[str, BackendRecord]:
    return {one.name: one for one in report.devices[0].backends if one.name in TILES}


@pytest.mark.parametrize("name", NAMES)
def test_what_each_machine_says_of_them(name: str) -> None:
    report = collect(machine=name)

    expected = ["opt-in", *CODES.get(name, ("capability",))]
    for one in tiles_of(report).values():
        assert [reason.code for reason in one.refusals] == expected
        assert one.recipes == ()
        assert one.refusals[0].sentence.startswith(
            f'{one.name} needs to be named (backend="{one.name}"), since it scales activations'
        )
    assert {choice.backend for choice in report.devices[0].routes}.isdisjoint(TILES)
    assert {name for choice in report.devices[0].routes for name in choice.also}.isdisjoint(TILES)


@pytest.mark.parametrize("statement", [None, "-cublaslt", "fbgemm_tile,triton"])
def test_a_probe_tests_what_is_named(
    statement: str | None, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200, versions={"mslk-cuda": None, "torchao": None})
    asked: set[str] = set()

    def judge(name: str, *_: Any, **__: Any) -> Verdict:
        asked.add(name)
        return Verdict("right", "as planted", "disk")

    monkeypatch.setattr(trust, "judge", judge)
    monkeypatch.setattr(
        "fp8dispatch.backends.library.LibraryBackend.loadable", lambda *_: ()
    )  # none of them is here
    if statement is not None:
        monkeypatch.setenv(policy.BACKEND_VARIABLE, statement)

    report = collect(probe=True)

    named = statement is not None and "fbgemm_tile" in statement
    assert ("fbgemm_tile" in asked) is named
    assert "mslk_tile" not in asked
    tile = tiles_of(report)["fbgemm_tile"]
    verdicts = {one.recipe: one.verdict for one in tile.recipes}
    assert verdicts.get("block 128x128") == ("right" if named else None)
    if named:
        block = next(one for one in report.devices[0].routes if one.recipe == "block 128x128")
        assert block.backend == "fbgemm_tile"


def test_a_library_that_does_not_fit_is_told_once(plant: Plant) -> None:
    """Nobody misses a backend that nobody named."""
    plant(H200, versions={"fbgemm-gpu-genai": "1.5.0"})

    degraded = [one.sentence for one in collect().findings if one.level == "degraded"]

    assert len(degraded) == 1
    assert "on cuda:0 fbgemm needs torch 2.10" in degraded[0]


def test_when_nothing_else_is_left_the_calls_raise_and_say_why(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    names = (name for name in registry.NAMES if name not in NAMED)
    monkeypatch.setenv(policy.BACKEND_VARIABLE, ",".join(f"-{name}" for name in names))

    report = collect()

    assert report.exit_code == 1
    choice = next(one for one in report.devices[0].routes if one.recipe == "block 128x128")
    assert choice.backend is None
    told = {one.backend: one.refusals[0].code for one in choice.passed_over}
    assert told == dict.fromkeys(NAMED, "opt-in")
