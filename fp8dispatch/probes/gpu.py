"""The NVIDIA GPUs of this host, read through NVML: no CUDA context, no torch.

NVML is a library of the driver; the module `pynvml` (distribution nvidia-ml-py) speaks to it.
Nothing stays open between two questions, so a fork inherits nothing from them.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeVar

from fp8dispatch import policy

_Answer = TypeVar("_Answer")

# NVML's return codes (nvml.h, nvmlReturn_t).
_NOT_SUPPORTED = 3
_NO_PERMISSION = 4
_NOT_FOUND = 6
_DRIVER_NOT_LOADED = 9
_LIBRARY_NOT_FOUND = 12
_FUNCTION_NOT_FOUND = 13
_VERSION_MISMATCH = 18
_NO_ANSWER = frozenset({_NOT_SUPPORTED, _FUNCTION_NOT_FOUND})

_WHY_NOT = {
    _NO_PERMISSION: "NVML needs access to the device files /dev/nvidia*, and this user has none",
    _DRIVER_NOT_LOADED: "NVML needs NVIDIA's kernel driver, and it is not loaded: there is no "
    "NVIDIA GPU here, or its driver is not installed",
    _LIBRARY_NOT_FOUND: "NVML needs the driver's library libnvidia-ml, and it was not found: "
    "there is no NVIDIA driver here, or the container was started without its GPUs",
    _VERSION_MISMATCH: "NVML needs a driver and a library of one version, and they differ since "
    "the driver was updated: reboot, or reload the kernel driver",
}

_NEEDED = (
    "NVMLError",
    "nvmlInit",
    "nvmlShutdown",
    "nvmlSystemGetDriverVersion",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetName",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetCudaComputeCapability",
    "nvmlDeviceGetMigMode",
    "nvmlDeviceGetMaxMigDeviceCount",
    "nvmlDeviceGetMigDeviceHandleByIndex",
    "nvmlDeviceGetGpuInstanceId",
    "nvmlDeviceGetComputeInstanceId",
)


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one slice of a GPU that is split (MIG).

    Attributes:
        index: NVML's number of the whole GPU, in the order of the PCI bus. CUDA counts otherwise:
            only the UUID says which device is which.
        name: marketing name.
        capability: CUDA compute capability, None where the driver does not say.
        memory_bytes: 0 where the driver does not say, as on GB10, which shares the CPU's.
        driver: version of the driver.
        uuid: ``"GPU-..."``, or ``"MIG-..."`` for a slice.
        mig: it is a slice.
        parent_uuid: of the whole GPU, for a slice.
        instance: numbers of the GPU instance and of the compute instance, for a slice.
    """

    index: int
    name: str
    capability: tuple[int, int] | None = None
    memory_bytes: int = 0
    driver: str = ""
    uuid: str = ""
    mig: bool = False
    parent_uuid: str = ""
    instance: tuple[int, int] | None = None


@dataclass(frozen=True)
class GpuReport:
    """What NVML said.

    Attributes:
        gpus: what could be read.
        problem: one sentence about what could not, else None. GPUs beside it are right.
        driver: version of the driver, ``""`` where it is not known.
    """

    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None
    driver: str = ""


def list_gpus() -> GpuReport:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this process, in the order it names them.

    NVML is asked once per process, a forked child asks again. Of a GPU that is split every slice
    is listed; named by number such a GPU stands for its first slice, as in CUDA.
    """
    host = _ask_host(os.getpid())
    return _visible(host, policy.cuda_visible_devices())


def find_gpu(uuid: str) -> GpuReport:
    """The one GPU with this UUID, whatever CUDA_VISIBLE_DEVICES says by now; empty if not found.

    Args:
        uuid: with or without its prefix ``GPU-`` or ``MIG-``: torch leaves it out. That of a GPU
            which is split finds its first slice.
    """
    host = _ask_host(os.getpid())
    wanted = _bare(uuid)
    if not wanted:
        return replace(host, gpus=())
    found = [gpu for gpu in host.gpus if _bare(gpu.uuid) == wanted]
    found += [gpu for gpu in host.gpus if _bare(gpu.parent_uuid) == wanted]
    return replace(host, gpus=tuple(found[:1]))


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")


@functools.cache
def _ask_host(process: int) -> GpuReport:
    """Every GPU of the host; `process` keeps a forked child from its parent's answer."""
    try:
        nvml = import_module("pynvml")
    except ImportError as error:
        return GpuReport(problem=f"GPUs need nvidia-ml-py to be listed, found none ({error})")
    missing = [name for name in _NEEDED if not hasattr(nvml, name)]
    if missing:
        where = getattr(nvml, "__file__", None) or "no file"
        return GpuReport(
            problem="GPUs need nvidia-ml-py to be listed, found another module named pynvml "
            f"({where}, without {missing[0]}): pip install --force-reinstall nvidia-ml-py"
        )
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return GpuReport(problem=_explain(error))
    problems: list[str] = []
    try:
        driver = _text(_optional(nvml, nvml.nvmlSystemGetDriverVersion, default=""))
        gpus: list[Gpu] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                gpus += _read(nvml, index, driver, problems)
            except nvml.NVMLError as error:
                problems.append(f"GPU {index} does not answer: {_explain(error)}")
    except nvml.NVMLError as error:
        return GpuReport(problem=_explain(error))
    finally:
        _close(nvml, problems)
    return GpuReport(tuple(gpus), "; ".join(problems) or None, driver)


def _close(nvml: Any, problems: list[str]) -> None:
    """Give NVML back; what others in this process have open stays open, it counts its users."""
    try:
        nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        problems.append(_explain(error))


def _read(nvml: Any, index: int, driver: str, problems: list[str]) -> list[Gpu]:
    """One GPU, or its slices where it is split."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    capability = _optional(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle, default=None)
    whole = Gpu(
        index,
        _text(nvml.nvmlDeviceGetName(handle)),
        None if capability is None else (int(capability[0]), int(capability[1])),
        _memory(nvml, handle),
        driver,
        _text(nvml.nvmlDeviceGetUUID(handle)),
    )
    mode = _optional(nvml, nvml.nvmlDeviceGetMigMode, handle, default=(0, 0))
    if not mode[0]:
        return [whole]
    slices: list[Gpu] = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError as error:
            if error.value == _NOT_FOUND:  # a place for a slice that was not made
                continue
            raise
        slices.append(
            replace(
                whole,
                name=_text(nvml.nvmlDeviceGetName(part)),
                memory_bytes=_memory(nvml, part),
                uuid=_text(nvml.nvmlDeviceGetUUID(part)),
                mig=True,
                parent_uuid=whole.uuid,
                instance=(
                    nvml.nvmlDeviceGetGpuInstanceId(part),
                    nvml.nvmlDeviceGetComputeInstanceId(part),
                ),
            )
        )
    if not slices:
        problems.append(
            f"GPU {index} ({whole.name}) is set to be split (MIG) and has no slice, so that "
            "nothing can run on it: make one with nvidia-smi mig -cgi, or switch MIG off"
        )
    return slices


def _optional(
    nvml: Any, question: Callable[..., _Answer], *arguments: Any, default: _Answer
) -> _Answer:
    """An answer that not every GPU, driver or container gives."""
    try:
        return question(*arguments)
    except nvml.NVMLError as error:
        if error.value in _NO_ANSWER:
            return default
        raise


def _memory(nvml: Any, handle: Any) -> int:
    info = _optional(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, default=None)
    return 0 if info is None else int(info.total)


def _text(value: str | bytes) -> str:
    """Old releases of the module answer in bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _explain(error: Any) -> str:
    """NVML's refusal as a sentence."""
    return _WHY_NOT.get(error.value, f"NVML answered with an error: {error}")


def _visible(host: GpuReport, wanted: str | None) -> GpuReport:
    """What CUDA_VISIBLE_DEVICES leaves of the host's GPUs.

    CUDA's rules (programming guide, "CUDA Environment Variables"): numbers or UUIDs, which may be
    cut short where they stay unique; the first entry that names nothing ends the list. An entry
    that is named twice leaves no device at all.
    """
    if wanted is None:
        return host
    chosen: list[Gpu] = []
    entries = [entry.strip() for entry in wanted.split(",")]
    for entry in entries:
        found = _named(host.gpus, entry)
        if found is None:
            break
        chosen.append(found)
    if len(set(chosen)) < len(chosen):
        chosen = []
    problem = host.problem
    kinds = Counter(gpu.name for gpu in host.gpus if not gpu.mig)
    if chosen and len(kinds) > 1 and entries[0][:1].isdecimal():
        problem = "; ".join(
            part
            for part in (
                problem,
                f"CUDA_VISIBLE_DEVICES={wanted} names GPUs by number and this host has different "
                f"ones ({', '.join(sorted(kinds))}), which CUDA numbers as NVML does only with "
                f"CUDA_DEVICE_ORDER=PCI_BUS_ID: name them by UUID",
            )
            if part
        )
    return replace(host, gpus=tuple(chosen), problem=problem)


def _named(gpus: tuple[Gpu, ...], entry: str) -> Gpu | None:
    """The GPU that one entry of CUDA_VISIBLE_DEVICES names."""
    number = re.match(r"\+?\d+", entry)
    if number is not None:  # CUDA reads the digits and skips what follows them
        return next((gpu for gpu in gpus if gpu.index == int(number[0])), None)
    text = entry.lower()
    if text.startswith("gpu-"):
        whole = {gpu.parent_uuid or gpu.uuid: gpu for gpu in reversed(gpus)}
        found = [gpu for uuid, gpu in whole.items() if uuid.lower().startswith(text)]
    elif text.startswith("mig-"):
        found = [gpu for gpu in gpus if gpu.mig and text in (gpu.uuid.lower(), _path(gpu))]
    else:
        found = []
    return found[0] if len(found) == 1 else None


def _path(gpu: Gpu) -> str:
    """A slice as drivers before R470 name it: ``MIG-<uuid of the GPU>/<instance>/<compute>``."""
    instance, compute = gpu.instance or (0, 0)
    return f"mig-{gpu.parent_uuid.lower()}/{instance}/{compute}"
