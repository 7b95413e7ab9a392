"""Which devices a report is about: what NVML lists and what this torch can use of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fp8dispatch import trust
from fp8dispatch.doctor.collect import collect
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.trust import Verdict
from tests.doctor.conftest import H200, RTX_4090, told

if TYPE_CHECKING:
    from tests.doctor.conftest import Plant


def test_two_different_gpus_are_decided_apart(plant: Plant) -> None:
    plant(H200, RTX_4090)

    report = collect()

    assert report.exit_code == 0
    chosen = [
        next(one.backend for one in device.routes if one.recipe == "block 128x128")
        for device in report.devices
    ]
    assert chosen == ["gluon", "triton"]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in told(report, "note")[0]
    assert [device.name for device in collect(device=1).devices] == [RTX_4090.name]
    with pytest.raises(InvalidInputError, match="0 to 1, found 2"):
        collect(device=2)


def test_nvml_problem_beside_gpus_is_degraded(plant: Plant) -> None:
    plant(H200, problem="GPU 1 does not answer: lost")

    report = collect()

    assert report.exit_code == 1
    assert told(report, "degraded") == ["GPU 1 does not answer: lost"]


@pytest.mark.parametrize(
    ("versions", "built_for"),
    [({}, "CUDA 13.0"), ({"cuda": None, "hip": "7.2", "torch": "2.11.0+rocm7.2"}, "ROCm 7.2")],
)
def test_gpus_that_nvml_does_not_list_are_asked_of_torch_by_probing(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, versions: Any, built_for: str
) -> None:
    plant(H200, RTX_4090, versions=versions, problem="NVML is not here", listed=False)
    monkeypatch.setattr(trust, "judge", lambda *_, **__: Verdict("right", "as planted", "disk"))

    report = collect()

    assert report.exit_code == 3
    assert told(report, "no gpu") == [
        f"no GPU was found: NVML is not here; --probe asks torch, built for {built_for}"
    ]
    probed = collect(probe=True)
    assert [device.name for device in probed.devices] == [H200.name, RTX_4090.name]
    assert told(probed, "no gpu") == []


def test_gpus_that_torch_does_not_see_are_degraded(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200, seen_by_torch=0)
    monkeypatch.setattr(trust, "judge", lambda *_, **__: Verdict("right", "as planted", "disk"))

    assert "sees no GPU where NVML lists 1" in told(collect(probe=True), "degraded")[0]


@pytest.mark.parametrize(
    ("driver", "cuda", "code"),
    [
        ("580.65.06", "13.0", 0),
        ("575.57.08", "13.0", 1),
        ("575.57.08", "12.8", 0),
        ("515.105.01", "12.6", 1),
        ("", "13.0", 0),  # nobody could say
        ("575.57.08", "14.0", 0),  # what that one needs is not known here
    ],
)
def test_driver_too_old_for_the_cuda_of_torch_is_degraded(
    plant: Plant, driver: str, cuda: str, code: int
) -> None:
    plant(H200, versions={"cuda": cuda}, driver=driver)

    report = collect()

    assert report.exit_code == code
    if code:
        (sentence,) = told(report, "degraded")
        assert f"later for CUDA {cuda}" in sentence
        assert f"found {driver}" in sentence


def test_gpu_beside_a_cpu_build_of_torch_is_degraded_and_calls_run_on_the_cpu(
    plant: Plant,
) -> None:
    plant(H200, versions={"cuda": None, "torch": "2.11.0+cpu"})

    report = collect()

    assert report.exit_code == 1
    assert "needs a CUDA build of torch" in told(report, "degraded")[0]
    assert [(one.device, one.decided) for one in report.devices] == [
        ("cuda:0", False),
        ("cpu", True),
    ]
