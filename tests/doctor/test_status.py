"""Each situation has its exit code, and a sentence that says what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8dispatch import __version__, registry, trust
from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.eager import Eager
from fp8dispatch.backends.library import LibraryBackend
from fp8dispatch.doctor.collect import collect
from fp8dispatch.doctor.report import EXIT_CODES, Finding, status_of
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.probes.store import Fingerprint, VerdictStore
from fp8dispatch.recipe import ROW
from fp8dispatch.trust import Verdict
from tests.doctor.conftest import H200, RTX_4090, told

if TYPE_CHECKING:
    from pathlib import Path

    from tests.doctor.conftest import Plant


@pytest.mark.parametrize(
    ("levels", "status", "code"),
    [
        ((), "healthy", 0),
        (("note",), "healthy", 0),
        (("note", "degraded"), "degraded", 1),
        (("degraded", "no gpu"), "no gpu", 3),
        (("degraded", "no gpu", "broken"), "broken", 4),
    ],
)
def test_the_worst_finding_decides(levels: tuple[Any, ...], status: Any, code: int) -> None:
    findings = tuple(Finding(level=level, sentence="as planted") for level in levels)

    assert status_of(findings) == status
    assert EXIT_CODES[status_of(findings)] == code


def test_healthy(plant: Plant) -> None:
    plant(H200)

    report = collect()

    assert (report.status, report.exit_code) == ("healthy", 0), report.findings
    (device,) = report.devices
    assert (device.device, device.capability, device.consumer) == ("cuda:0", (9, 0), False)


def test_wrong_numbers_are_broken(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(H200)

    def judge(name: str, *_: Any, **__: Any) -> Verdict:
        state = "wrong" if name == "gluon" else "right"
        return Verdict(state, "as planted", "disk")

    monkeypatch.setattr(trust, "judge", judge)

    report = collect()

    assert (report.status, report.exit_code) == ("broken", 4)
    assert "gluon is wrong for row on cuda:0: as planted" in told(report, "broken")
    row = next(one for one in report.devices[0].routes if one.recipe == "row")
    assert row.backend == "triton"
    assert row.passed_over[0].backend == "gluon"
    assert row.passed_over[0].refusals[0].code == "numbers"


def test_stored_verdict_is_read_and_nothing_is_probed(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(H200)
    machine = collect().devices[0]
    versions = {
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "triton": "3.6.0",
        "nvidia-cublas": "13.1.0.3",
    }
    fingerprint = Fingerprint(
        backend="cublaslt",
        recipe=str(ROW),
        device=f"cuda {machine.name}",
        capability=(9, 0),
        driver=machine.driver,
        versions=versions,
        fp8dispatch=__version__,
    )
    VerdictStore(tmp_path / "cache").put(fingerprint, "wrong", "as stored")
    monkeypatch.setattr(trust, "_probe", lambda *_: pytest.fail("probed without --probe"))

    report = collect()

    assert report.exit_code == 4
    assert told(report, "broken") == ["cublaslt is wrong for row on cuda:0: as stored"]
    assert report.cache.verdicts == 1


def test_untested_backend_is_shown_as_the_first_call_would_choose_it(plant: Plant) -> None:
    plant(H200)

    (device,) = collect().devices

    tensor = device.routes[0]
    assert (tensor.backend, tensor.numbers) == ("gluon", "untested")


def test_probe_asks_for_verdicts_and_reports_them(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200, versions={"fbgemm-gpu-genai": None, "mslk-cuda": None, "torchao": None})
    asked: list[tuple[str, str, bool]] = []

    def judge(name: str, *rest: Any, may_probe: bool) -> Verdict:
        asked.append((name, str(rest[3]), may_probe))
        state = "untested" if name == "triton" else "right"
        return Verdict(state, "as probed", "in this process")

    monkeypatch.setattr(trust, "judge", judge)
    steps: list[str] = []

    report = collect(probe=True, on_step=steps.append)

    assert report.probed
    assert report.exit_code == 0, report.findings
    assert ("cublaslt", "row", True) in asked
    assert len(asked) == len(set(asked)), "each question once"
    assert all(may_probe for _, _, may_probe in asked)
    assert "testing cublaslt, row, on cuda:0" in steps
    verdicts = {
        (backend.name, one.recipe): one.verdict
        for backend in report.devices[0].backends
        for one in backend.recipes
    }
    assert verdicts["cublaslt", "row"] == "right"
    assert verdicts["triton", "row"] == "untested"
    assert verdicts["cublaslt", "block 1x32"] == "refused"


def test_no_gpu_is_said_and_the_report_is_complete(plant: Plant) -> None:
    plant(versions={"cuda": None}, problem="NVML needs a driver")

    report = collect()

    assert (report.status, report.exit_code) == ("no gpu", 3)
    assert told(report, "no gpu") == ["no GPU was found: NVML needs a driver"]
    (device,) = report.devices
    assert device.device == "cpu"
    assert len(device.routes) == 40
    assert {choice.backend for choice in device.routes} == {"eager"}


def test_another_machine_needs_no_gpu() -> None:
    assert collect(machine="cpu").exit_code == 0


def test_only_plain_torch_on_a_gpu_is_degraded(plant: Plant) -> None:
    plant(H200, versions={"triton": None, "torchao": None})

    report = collect()

    assert report.exit_code == 1
    assert "only plain torch, which is slow, takes" in told(report, "degraded")[0]


def test_plain_torch_that_was_asked_for_is_healthy(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    monkeypatch.setenv("FP8DISPATCH_BACKEND", "eager")

    report = collect()

    assert report.exit_code == 0
    assert report.devices[0].routes[0].decided_by == "FP8DISPATCH_BACKEND"


@pytest.mark.parametrize(("gpu", "code"), [(H200, 1), (RTX_4090, 0)])
def test_library_with_the_wrong_torch_matters_where_it_could_run(
    plant: Plant, gpu: Any, code: int
) -> None:
    plant(gpu, versions={"fbgemm-gpu-genai": "1.5.0"})

    report = collect()

    assert report.exit_code == code
    library = next(one for one in report.libraries if one.name == "fbgemm-gpu-genai")
    assert (library.needs, library.fits) == ("torch 2.10", False)
    assert library.install == "pip install fbgemm-gpu-genai==1.6.0"


class Loud(Eager):
    """A plugin that raises where it should answer."""

    name = "loud"

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        raise ZeroDivisionError("as planted")


def _plant_backend(monkeypatch: pytest.MonkeyPatch, backend: Backend | Exception) -> None:
    loaded: Any = registry.load

    def load(name: str) -> Backend:
        if name != "loud":
            planted: Backend = loaded(name)
            return planted
        if isinstance(backend, Exception):
            raise backend
        return backend

    monkeypatch.setattr(registry, "load", load)
    monkeypatch.setattr(registry, "NAMES", ("loud", *registry.NAMES))


@pytest.mark.parametrize("backend", [Loud(), OSError("as planted")])
def test_broken_plugin_is_reported_and_harms_nothing_else(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    plant(H200)
    _plant_backend(monkeypatch, backend)

    report = collect()

    assert report.exit_code == 1
    (sentence,) = told(report, "degraded")
    assert "on cuda:0 loud needs" in sentence
    assert "as planted" in sentence
    assert report.devices[0].routes[0].backend == "gluon"


class Unloadable(LibraryBackend):
    """Installed by its metadata; its import fails."""

    name = "loud"
    needs_to_load = "loud to import"

    def _load(self) -> tuple[Refusal, ...]:
        raise OSError("libloud.so.1: cannot open shared object file")

    def matmul(self, *_: Any) -> torch.Tensor:
        raise AssertionError("never loaded")


def test_library_that_does_not_load_is_found_by_probing_alone(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200, versions={"fbgemm-gpu-genai": None, "mslk-cuda": None, "torchao": None})
    _plant_backend(monkeypatch, Unloadable())
    asked: set[str] = set()

    def judge(name: str, *_: Any, **__: Any) -> Verdict:
        asked.add(name)
        return Verdict("right", "as planted", "disk")

    monkeypatch.setattr(trust, "judge", judge)
    assert collect().exit_code == 0
    asked.clear()

    report = collect(probe=True)

    assert report.exit_code == 1
    assert "cannot open shared object file" in told(report, "degraded")[0]
    assert "loud" not in asked, "what does not load has no numbers, right or wrong"


def test_statement_that_no_call_survives_is_degraded(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    monkeypatch.setenv("FP8DISPATCH_BACKEND", "cublaslt")

    report = collect()

    assert report.exit_code == 1
    assert "24 of the 40 calls in the route table raise" in told(report, "degraded")[0]
    ragged = next(one for one in report.devices[0].routes if one.n == 4100)
    assert ragged.backend is None
    assert [one.backend for one in ragged.passed_over] == ["cublaslt"]
    codes = [reason.code for reason in ragged.passed_over[0].refusals]
    assert codes == ["align-n", "align-k"]


def test_statement_that_cannot_be_read_is_degraded(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    monkeypatch.setenv("FP8DISPATCH_BACKEND", "tritton")

    report = collect()

    assert report.exit_code == 1
    assert "every call raises (FP8DISPATCH_BACKEND='tritton'" in told(report, "degraded")[0]


def test_quarantine_is_reported(plant: Plant) -> None:
    plant(H200)
    trust.quarantine("gluon", torch.device("cuda:0"), ROW, "as planted")

    report = collect()

    assert report.exit_code == 1
    assert report.quarantine[0].recipe == "row"
    row = next(one for one in report.devices[0].routes if one.recipe == "row")
    assert row.backend == "triton"
