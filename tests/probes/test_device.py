"""One device described: torch's facts, joined by UUID with the driver's."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from fp8dispatch.probes import device, gpu
from fp8dispatch.probes.device import describe, runs_kernels
from tests.probes.test_gpu import H200, NO_PERMISSION, RTX, SLICES, SPLIT, Card, Host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8dispatch.machine import Machine


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    gpu._ask_host.cache_clear()
    device._describe.cache_clear()
    runs_kernels.cache_clear()
    yield
    gpu._ask_host.cache_clear()
    device._describe.cache_clear()
    runs_kernels.cache_clear()


class Torch:
    """Torch with the devices of these cards, in this order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *cards: Card) -> None:
        self.asked: list[int] = []
        self.current = 0

        def properties(which: torch.device) -> SimpleNamespace:
            self.asked.append(which.index)
            card = cards[which.index]
            return SimpleNamespace(
                name=card.name,
                major=card.capability[0],
                minor=card.capability[1],
                total_memory=card.memory - 1000,
                uuid=card.uuid.split("-", 1)[1],
            )

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.version, "cuda", "13.0")


def cuda(index: int) -> Machine:
    return describe(torch.device("cuda", index))


def test_joined_by_uuid_not_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA numbers the faster card first, NVML the one on the lower bus."""
    monkeypatch.setitem(sys.modules, "pynvml", Host([RTX, SPLIT, H200]))
    fake = Torch(monkeypatch, H200, RTX, SLICES[1])

    first, second, third = cuda(0), cuda(1), cuda(2)

    assert (first.device_name, first.capability, first.uuid) == (H200.name, (9, 0), H200.uuid)
    assert first.memory_bytes == H200.memory - 1000, "torch's own, which is what it can allocate"
    assert (second.device_name, second.capability, second.uuid) == (RTX.name, (8, 9), RTX.uuid)
    assert (third.mig, third.uuid) == (True, SLICES[1].uuid)
    assert not first.mig
    assert {first.driver, second.driver, third.driver} == {"580.159.04"}
    assert first.versions["cuda"] == "13.0"
    assert fake.asked == [0, 1, 2]
    assert cuda(1) is second
    assert fake.asked == [0, 1, 2], "asked once per device"


def test_no_number_is_the_device_that_is_current_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Host([H200, RTX]))
    fake = Torch(monkeypatch, H200, RTX)

    assert describe(torch.device("cuda")).capability == (9, 0)
    fake.current = 1
    assert describe(torch.device("cuda")).capability == (8, 9)


def test_torch_alone_where_nvml_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Host([], refuse=NO_PERMISSION))
    Torch(monkeypatch, RTX, SLICES[0])

    whole, part = cuda(0), cuda(1)

    assert (whole.device_name, whole.capability, whole.driver) == (RTX.name, (8, 9), "")
    assert (whole.uuid, whole.mig) == (RTX.uuid, False)
    assert (part.uuid, part.mig) == (SLICES[0].uuid, True)


def test_a_device_that_nvml_does_not_know_has_the_driver_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Host([RTX]))
    Torch(monkeypatch, H200)
    assert (cuda(0).driver, cuda(0).uuid) == ("580.159.04", H200.uuid)


def test_torch_that_names_the_whole_of_a_split_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Host([SPLIT]))
    Torch(monkeypatch, SPLIT)
    assert (cuda(0).mig, cuda(0).uuid) == (True, SPLIT.uuid)


def test_rocm_is_not_asked_of_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host([H200])
    monkeypatch.setitem(sys.modules, "pynvml", host)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    Torch(monkeypatch, Card("AMD Instinct MI300X", "GPU-65303434", (9, 4)))

    found = cuda(0)

    assert found.is_rocm
    assert (found.architecture, found.driver, host.initialised) == ("cdna3", "", 0)


def test_the_cpu_is_asked_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host([H200])
    monkeypatch.setitem(sys.modules, "pynvml", host)

    found = describe(torch.device("cpu"))

    assert (found.device_type, found.capability, found.uuid) == ("cpu", None, "")
    assert found.versions["torch"] == str(torch.__version__)
    assert type(found.versions["torch"]) is str
    assert host.initialised == 0
    assert not runs_kernels(torch.device("cpu"))


@pytest.mark.gpu
def test_every_device_here() -> None:
    for index in range(torch.cuda.device_count()):
        found = cuda(index)
        facts = torch.cuda.get_device_properties(index)
        assert found.uuid.endswith(str(facts.uuid))
        assert found.uuid.startswith(("GPU-", "MIG-"))
        assert found.driver
        assert found.memory_bytes == facts.total_memory
        assert runs_kernels(torch.device("cuda", index))
