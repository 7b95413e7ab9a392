"""A machine with GPUs to examine, without having one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fp8dispatch import decide, overrides, policy, trust
from fp8dispatch.backends import gluon
from fp8dispatch.doctor import devices
from fp8dispatch.doctor.report import Report
from fp8dispatch.machine import Machine
from fp8dispatch.probes import device as device_probe
from fp8dispatch.probes.gallery import CUDA_LIBRARIES
from fp8dispatch.probes.gpu import Gpu, GpuReport
from fp8dispatch.probes.torch_build import TorchBuild

H200 = Gpu(0, "NVIDIA H200", (9, 0), 143_771 << 20, "580.159.04", "GPU-11111111-2222")
RTX_4090 = Gpu(1, "NVIDIA GeForce RTX 4090", (8, 9), 24_564 << 20, "580.159.04", "GPU-3333")

Plant = Callable[..., None]


def told(report: Report, level: str) -> list[str]:
    """The sentences of the findings of one level."""
    return [finding.sentence for finding in report.findings if finding.level == level]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No statement, no verdict and no variable from outside the test."""
    for variable in ("FP8DISPATCH_BACKEND", "FP8DISPATCH_ACCURACY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FP8DISPATCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "110")
    _forget()
    yield
    _forget()


def _forget() -> None:
    policy.reload_environment()
    overrides.set_backend()
    trust.forget()
    trust.release()
    decide.forget()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Make this a machine with the GPUs and libraries that a test names."""

    def planted(
        *gpus: Gpu,
        versions: dict[str, str | None] | None = None,
        problem: str | None = None,
        seen_by_torch: int | None = None,
        listed: bool = True,
        driver: str = "580.159.04",
    ) -> None:
        installed = {**CUDA_LIBRARIES, **(versions or {})}
        libraries = {name: text for name, text in installed.items() if text is not None}

        def describe(device: torch.device) -> Machine:
            if device.type == "cpu":
                return Machine("cpu", "cpu", None, libraries)
            gpu = gpus[device.index]
            return Machine("cuda", gpu.name, gpu.capability, libraries, uuid=gpu.uuid)

        report = GpuReport(gpus if listed else (), problem, driver)
        build = TorchBuild(libraries["torch"], libraries.get("cuda"), libraries.get("hip"))
        packages = {name: libraries[name] for name in libraries if name not in ("cuda", "hip")}
        monkeypatch.setattr(devices, "list_gpus", lambda: report)
        monkeypatch.setattr(devices, "read_torch_build", lambda: build)
        monkeypatch.setattr(devices, "installed_versions", lambda: packages)
        monkeypatch.setattr(device_probe, "describe", describe)
        # Tests import Triton for its interpreter, which cannot import Gluon afterwards.
        monkeypatch.setattr(gluon.BACKEND, "_load_refusals", ())
        seen = len(gpus) if seen_by_torch is None else seen_by_torch
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)

    return planted
