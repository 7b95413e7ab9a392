"""GPUs as NVML tells of them: a made-up `pynvml` stands for every driver, or for none."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from fp8dispatch.probes import gpu
from fp8dispatch.probes.gpu import GpuReport, find_gpu, list_gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, NO_DRIVER, NO_LIBRARY, MISMATCH, LOST = (
    3,
    4,
    6,
    9,
    12,
    18,
    15,
)
GIB = 1024**3


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"code {value}")
        self.value = value


@dataclass
class Card:
    """One GPU of a made-up host; what is an int instead of a fact is the error it raises."""

    name: Any
    uuid: Any
    capability: Any = (9, 0)
    memory: Any = 80 * GIB
    mig: Any = 0
    slices: list[Card | None] = field(default_factory=list)
    ids: tuple[int, int] = (0, 0)
    dead: int = 0


class Host(ModuleType):
    """A module that behaves as pynvml does on a host with these cards."""

    def __init__(self, cards: list[Card], driver: Any = "580.159.04", refuse: int = 0) -> None:
        super().__init__("pynvml")
        self.NVMLError = NVMLError
        self.initialised = 0
        self.open = 0

        def start() -> None:
            if refuse:
                raise NVMLError(refuse)
            self.initialised += 1
            self.open += 1

        def stop() -> None:
            self.open -= 1

        def told(fact: Callable[[Card], Any]) -> Callable[[Card], Any]:
            def ask(card: Card) -> Any:
                if isinstance(answer := fact(card), int):
                    raise NVMLError(answer)
                return answer

            return ask

        def handle(index: int) -> Card:
            if cards[index].dead:
                raise NVMLError(cards[index].dead)
            return cards[index]

        def part(card: Card, number: int) -> Card:
            found = card.slices[number]
            if found is None:
                raise NVMLError(NOT_FOUND)
            return found

        self.nvmlInit, self.nvmlShutdown = start, stop
        self.nvmlSystemGetDriverVersion = lambda: driver
        self.nvmlDeviceGetCount = lambda: len(cards)
        self.nvmlDeviceGetHandleByIndex = handle
        self.nvmlDeviceGetName = told(lambda card: card.name)
        self.nvmlDeviceGetUUID = told(lambda card: card.uuid)
        self.nvmlDeviceGetCudaComputeCapability = told(lambda card: card.capability)
        self.nvmlDeviceGetMemoryInfo = told(
            lambda card: (
                NOT_SUPPORTED if card.memory is None else SimpleNamespace(total=card.memory)
            )
        )
        self.nvmlDeviceGetMigMode = told(
            lambda card: NOT_SUPPORTED if card.mig is None else [card.mig, card.mig]
        )
        self.nvmlDeviceGetMaxMigDeviceCount = lambda card: len(card.slices)
        self.nvmlDeviceGetMigDeviceHandleByIndex = part
        self.nvmlDeviceGetGpuInstanceId = lambda card: card.ids[0]
        self.nvmlDeviceGetComputeInstanceId = lambda card: card.ids[1]


H200 = Card("NVIDIA H200", "GPU-8c264634-e3b2-1d53-96c5-a5697befcd32", memory=150754820096)
RTX = Card("NVIDIA GeForce RTX 4090", "GPU-f0e4af33-0b00-578f-3c3f-43aa6c616614", (8, 9), mig=None)
SLICES = [
    Card("NVIDIA H100 80GB HBM3 MIG 1g.10gb", f"MIG-{n}aaaaaaa-1111", memory=n * GIB, ids=(n, 0))
    for n in (7, 8)
]
SPLIT = Card("NVIDIA H100 80GB HBM3", "GPU-5555aaaa-01", mig=1, slices=[SLICES[0], None, SLICES[1]])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No answer from another test, and no wish of the environment."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu._ask_host.cache_clear()
    yield
    gpu._ask_host.cache_clear()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Host]:
    def planted(*cards: Card, **facts: Any) -> Host:
        host = Host(list(cards), **facts)
        monkeypatch.setitem(sys.modules, "pynvml", host)
        return host

    return planted


def test_two_different_gpus(plant: Callable[..., Host]) -> None:
    host = plant(H200, RTX)

    report = list_gpus()

    assert report.problem is None
    assert report.driver == "580.159.04"
    first, second = report.gpus
    assert (first.index, first.name, first.capability) == (0, "NVIDIA H200", (9, 0))
    assert (first.memory_bytes, first.driver, first.mig) == (150754820096, "580.159.04", False)
    assert (second.index, second.name, second.capability) == (1, RTX.name, (8, 9))
    assert second.uuid == RTX.uuid
    assert (host.initialised, host.open) == (1, 0), "NVML is given back"
    assert list_gpus() == report
    assert host.initialised == 1, "and asked once"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (NO_LIBRARY, "libnvidia-ml"),
        (NO_DRIVER, "kernel driver"),
        (MISMATCH, "of one version"),
        (NO_PERMISSION, "/dev/nvidia"),
        (999, "code 999"),
    ],
)
def test_a_driver_that_refuses_is_one_sentence(
    code: int, words: str, plant: Callable[..., Host]
) -> None:
    plant(H200, refuse=code)

    report = list_gpus()

    assert report.gpus == ()
    assert report.problem is not None
    assert words in report.problem
    assert "\n" not in report.problem


def test_no_module_and_a_module_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in str(list_gpus().problem)

    gpu._ask_host.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    assert "another module named pynvml" in str(list_gpus().problem)


def test_no_gpu_is_no_problem(plant: Callable[..., Host]) -> None:
    plant()
    assert list_gpus() == GpuReport((), None, "580.159.04")


def test_a_lost_gpu_leaves_the_other(plant: Callable[..., Host]) -> None:
    host = plant(Card("NVIDIA H200", "GPU-1", dead=LOST), RTX)

    report = list_gpus()

    assert [found.index for found in report.gpus] == [1]
    assert report.problem == "GPU 0 does not answer: NVML answered with an error: code 15"
    assert host.open == 0


def test_what_a_driver_does_not_tell_is_left_empty(plant: Callable[..., Host]) -> None:
    """GB10 has no memory of its own; old modules answer in bytes."""
    plant(
        Card(b"NVIDIA GB10", b"GPU-abc", NOT_SUPPORTED, memory=None, mig=None), driver=b"580.126.09"
    )

    report = list_gpus()

    assert report.problem is None
    (found,) = report.gpus
    assert (found.name, found.uuid, found.driver) == ("NVIDIA GB10", "GPU-abc", "580.126.09")
    assert (found.capability, found.memory_bytes, found.mig) == (None, 0, False)


def test_a_split_gpu_is_its_slices(plant: Callable[..., Host]) -> None:
    plant(SPLIT)

    report = list_gpus()

    assert report.problem is None
    assert [found.uuid for found in report.gpus] == [part.uuid for part in SLICES]
    assert all(found.mig and found.capability == (9, 0) for found in report.gpus)
    assert all(found.parent_uuid == SPLIT.uuid for found in report.gpus)
    assert [found.memory_bytes for found in report.gpus] == [7 * GIB, 8 * GIB]
    assert [found.instance for found in report.gpus] == [(7, 0), (8, 0)]


def test_a_split_gpu_without_slices(plant: Callable[..., Host]) -> None:
    plant(Card("NVIDIA H100", "GPU-1", mig=1, slices=[None, None]))
    report = list_gpus()
    assert report.gpus == ()
    assert "has no slice" in str(report.problem)


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),
        ("0,0", []),
        ("1,", [1]),
        ("1gpu", [1]),
        ("GPU-bbbb", [1]),
        ("gpu-BBBB2222-0,GPU-aaaa", [1, 0]),
        ("GPU-", []),
        ("GPU-aaaa,GPU-ffff,GPU-bbbb", [0]),
        ("MIG-aaaa", []),
    ],
)
def test_cuda_visible_devices(
    wanted: str | None,
    indices: list[int],
    plant: Callable[..., Host],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(
        Card("NVIDIA H200", "GPU-aaaa1111-0"),
        Card("NVIDIA H200", "GPU-bbbb2222-0"),
        Card("NVIDIA H200", "GPU-cccc3333-0"),
    )
    if wanted is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)

    report = list_gpus()

    assert [found.index for found in report.gpus] == indices
    assert report.problem is None


@pytest.mark.parametrize(
    ("wanted", "uuids"),
    [
        (SLICES[1].uuid, [SLICES[1].uuid]),
        (f"MIG-{SPLIT.uuid}/8/0", [SLICES[1].uuid]),
        (f"MIG-{SPLIT.uuid}/9/0", []),
        ("MIG-8", []),  # cut short: CUDA takes that of GPUs alone
        ("1", [SLICES[0].uuid]),
        (SPLIT.uuid, [SLICES[0].uuid]),
    ],
)
def test_slices_by_name(
    wanted: str, uuids: list[str], plant: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200, SPLIT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
    assert [found.uuid for found in list_gpus().gpus] == uuids


def test_numbers_of_different_gpus_are_doubted(
    plant: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200, RTX)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in str(list_gpus().problem)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", RTX.uuid)
    assert list_gpus().problem is None


def test_find_by_uuid_whatever_is_visible(
    plant: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200, RTX, SPLIT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def found(uuid: str) -> list[str]:
        report = find_gpu(uuid)
        assert report.driver == "580.159.04"
        return [entry.uuid for entry in report.gpus]

    assert found(RTX.uuid.removeprefix("GPU-").upper()) == [RTX.uuid]
    assert found(SLICES[1].uuid.removeprefix("MIG-")) == [SLICES[1].uuid]
    assert found(SPLIT.uuid) == [SLICES[0].uuid]
    assert found("0000") == []
    assert found("") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_asks_for_itself() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", _FORK], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


_FORK = """
import os, sys, types
from fp8dispatch.probes import gpu

asked = []
class NVMLError(Exception):
    value = 9
def start():
    asked.append(os.getpid())
    raise NVMLError
module = types.ModuleType("pynvml")
for name in gpu._NEEDED:
    setattr(module, name, None)
module.NVMLError, module.nvmlInit = NVMLError, start
sys.modules["pynvml"] = module
assert gpu.list_gpus().problem and gpu.list_gpus().problem
assert asked == [os.getpid()]
child = os.fork()
if child == 0:
    gpu.list_gpus()
    os._exit(0 if asked == [os.getppid(), os.getpid()] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_listing_imports_no_torch_and_the_package_lists_nothing() -> None:
    code = """
import sys
import fp8dispatch
loaded = {name for name in sys.modules if "probes" in name or name in ("pynvml", "torch")}
assert not loaded, loaded
from fp8dispatch.probes import gpu, packages, gallery
assert "pynvml" not in sys.modules
gpu.list_gpus(), packages.package_report(), gallery.simulated("h100")
assert "torch" not in sys.modules
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.gpu
def test_the_driver_here_lists_what_torch_sees() -> None:
    import torch

    report = list_gpus()

    assert report.problem is None
    assert report.driver.split(".")[0].isdecimal()
    seen = {str(torch.cuda.get_device_properties(n).uuid) for n in range(torch.cuda.device_count())}
    assert {found.uuid.split("-", 1)[1] for found in report.gpus} == seen
