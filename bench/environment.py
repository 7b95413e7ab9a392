"""What a result file says about the machine that it was measured on, and how it is written."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fp8dispatch
from fp8dispatch.atomic import write_atomically

DISTRIBUTIONS = (
    "torch",
    "triton",
    "nvidia-cublas",
    "fbgemm-gpu-genai",
    "mslk",
    "torchao",
    "sgl-deep-gemm",
)


def describe() -> dict[str, Any]:
    """GPU, driver and versions, as plain data."""
    versions = {"fp8dispatch": fp8dispatch.__version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions,
    }
    if torch.cuda.is_available():
        gauge = Gauge("cuda")
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver, power limit"] = gauge.driver_and_limit()
    return facts


class Gauge:
    """Reads clock, power and temperature of the current GPU through NVML; of a CPU, nothing.

    The power that NVML reports is a mean over about a second, so it says something right after
    work of that length; the clock is that of the moment.
    """

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        if device != "cuda":
            return
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        # NVML counts GPUs otherwise than CUDA does: the UUID says which one is meant.
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        self._handle = self._ask("nvmlDeviceGetHandleByUUID", uuid)

    def _ask(self, question: str, *arguments: Any) -> Any:
        """NVML's answer; None where it has none, as for a slice of a GPU."""
        try:
            return getattr(self._nvml, question)(*arguments)
        except self._nvml.NVMLError:
            return None

    def read(self) -> dict[str, int | None] | None:
        """SM clock in MHz, power in milliwatts, temperature in degrees Celsius; None on a CPU."""
        if self._nvml is None:
            return None
        clock, sensor = self._nvml.NVML_CLOCK_SM, self._nvml.NVML_TEMPERATURE_GPU
        return {
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", self._handle, clock),
            "milliwatts": self._ask("nvmlDeviceGetPowerUsage", self._handle),
            "celsius": self._ask("nvmlDeviceGetTemperature", self._handle, sensor),
        }

    def driver_and_limit(self) -> str:
        """For example "580.159.04, 700.00 W"."""
        milliwatts = self._ask("nvmlDeviceGetEnforcedPowerLimit", self._handle)
        limit = "unknown power limit" if milliwatts is None else f"{milliwatts / 1e3:.2f} W"
        return f"{self._ask('nvmlSystemGetDriverVersion')}, {limit}"


def write(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write a result with the description of this machine, whole or not at all."""
    save(path, {"machine": describe(), **result})
    print(f"wrote {path}")


def save(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write a result that has its machine already."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, (json.dumps(result, indent=1) + "\n").encode())
