"""What a result says of its machine: NVML is asked for the device that torch uses."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import environment
from bench.environment import Gauge


class NVMLError(Exception):
    pass


def nvml(**answers: Any) -> types.ModuleType:
    module: Any = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVML_CLOCK_SM, module.NVML_TEMPERATURE_GPU = 1, 0
    module.nvmlInit = lambda: None
    module.asked = []

    def by_uuid(uuid: str) -> str:
        module.asked.append(uuid)
        return "handle"

    module.nvmlDeviceGetHandleByUUID = by_uuid
    module.nvmlDeviceGetClockInfo = lambda handle, kind: 1755
    module.nvmlDeviceGetPowerUsage = lambda handle: 612_345
    module.nvmlDeviceGetTemperature = lambda handle, sensor: 61
    module.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 700_000
    module.nvmlSystemGetDriverVersion = lambda: "580.1"
    for name, answer in answers.items():
        setattr(module, name, answer)
    return module  # type: ignore[no-any-return]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    properties = types.SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: properties}.__getitem__)


@pytest.mark.usefixtures("device")
def test_the_gauge_reads_the_device_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)

    gauge = Gauge("cuda")

    assert module.asked == ["GPU-1234-abcd"]
    assert gauge.read() == {"sm_mhz": 1755, "milliwatts": 612_345, "celsius": 61}
    assert gauge.driver_and_limit() == "580.1, 700.00 W"


@pytest.mark.usefixtures("device")
def test_what_nvml_does_not_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise NVMLError

    module = nvml(nvmlDeviceGetPowerUsage=refuse, nvmlDeviceGetEnforcedPowerLimit=refuse)
    monkeypatch.setitem(sys.modules, "pynvml", module)

    gauge = Gauge("cuda")

    assert gauge.read() == {"sm_mhz": 1755, "milliwatts": None, "celsius": 61}
    assert gauge.driver_and_limit() == "580.1, unknown power limit"


def test_a_cpu_has_no_gauge() -> None:
    assert Gauge("cpu").read() is None


def test_a_result_holds_versions_and_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"

    environment.write(path, {"figures": [1]})

    written = json.loads(path.read_text())
    assert written["figures"] == [1]
    assert set(environment.DISTRIBUTIONS) < set(written["machine"]["versions"])
    assert list(path.parent.iterdir()) == [path]
