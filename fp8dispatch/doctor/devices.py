"""Which devices to ask about: those that NVML lists, those of torch, or one of the gallery."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType

from fp8dispatch.doctor.report import Finding
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.machine import Machine
from fp8dispatch.probes.gallery import simulated
from fp8dispatch.probes.gpu import Gpu, GpuReport, list_gpus
from fp8dispatch.probes.packages import installed_versions


@dataclass(frozen=True)
class Device:
    """One device to ask about.

    Attributes:
        name: as torch names it, or the name in the gallery.
        machine: the device and its libraries as plain data.
        decided: whether backends can be asked about it.
        simulated: it comes from the gallery.
    """

    name: str
    machine: Machine
    decided: bool
    simulated: bool = False


@dataclass(frozen=True)
class Devices:
    """The devices, the versions around them, and what is to be said about both."""

    devices: tuple[Device, ...]
    versions: Mapping[str, str]
    findings: tuple[Finding, ...] = ()


def import_torch() -> tuple[ModuleType | None, tuple[Finding, ...]]:
    """Torch, or the sentence that stands for everything that needs it."""
    try:
        return import_module("torch"), ()
    except Exception as error:  # noqa: BLE001  # a broken build raises anything: that is the finding
        sentence = (
            f"backends, routes and verdicts need torch, and it cannot be imported "
            f"({_first_line(error)}): install it again to see them"
        )
        return None, (Finding(level="degraded", sentence=sentence),)


def find_devices(
    torch: ModuleType | None, *, machine: str | None, index: int | None, probe: bool
) -> Devices:
    """The devices to ask about.

    Args:
        torch: the module, None where it cannot be imported.
        machine: a name of the gallery, to ask about that and nothing here.
        index: the one GPU to ask about, as CUDA counts them; None asks about all.
        probe: ask torch, which starts CUDA, instead of NVML alone.

    Raises:
        InvalidInputError: no machine of that name, no GPU of that number.
    """
    if machine is not None:
        stand_in = simulated(machine)
        device = Device(machine, stand_in, decided=torch is not None, simulated=True)
        return Devices((device,), stand_in.versions)
    report = list_gpus()
    found = _without_torch(report) if torch is None else _with_torch(torch, report, probe=probe)
    gpus = [device for device in found.devices if device.machine.device_type == "cuda"]
    if index is None or not gpus:
        return found
    if not 0 <= index < len(gpus):
        raise InvalidInputError(
            f"--device must be the number of a visible GPU, 0 to {len(gpus) - 1}, found {index}"
        )
    return replace(found, devices=(gpus[index],))


def _without_torch(report: GpuReport) -> Devices:
    versions = installed_versions()
    base = Machine("cpu", "cpu", None, versions)
    devices = [_of_nvml(base, gpu, index, False) for index, gpu in enumerate(report.gpus)]
    return Devices(
        tuple(devices) or (Device("cpu", base, decided=False),),
        versions,
        (*_nvml_findings(report), *(() if devices else (_no_gpu(report),))),
    )


def _with_torch(torch: ModuleType, report: GpuReport, *, probe: bool) -> Devices:
    from fp8dispatch.probes.device import describe

    cpu = describe(torch.device("cpu"))
    built_for_gpus = "cuda" in cpu.versions or "hip" in cpu.versions
    findings = list(_nvml_findings(report))
    devices = [_of_nvml(cpu, gpu, index, built_for_gpus) for index, gpu in enumerate(report.gpus)]
    if report.gpus and not built_for_gpus:
        sentence = (
            f"a GPU needs a CUDA build of torch to be used, found torch {cpu.versions['torch']}: "
            f"install one from https://pytorch.org"
        )
        findings.append(Finding(level="degraded", sentence=sentence))
    elif built_for_gpus:
        seen, problem = _count_of_torch(torch)
        if problem:
            findings.append(Finding(level="degraded", sentence=problem))
        elif probe and seen:
            try:
                devices = [
                    Device(f"cuda:{index}", describe(torch.device("cuda", index)), decided=True)
                    for index in range(seen)
                ]
            except RuntimeError as error:  # CUDA does not start: a busy or broken device
                sentence = f"torch cannot start CUDA ({_first_line(error)})"
                findings.append(Finding(level="degraded", sentence=sentence))
        elif seen and not devices:
            sentence = (
                f"torch counts {seen} GPU(s) and NVML lists none ({report.problem or 'no reason'})"
                f": --probe asks torch for them, which starts CUDA"
            )
            findings.append(Finding(level="degraded", sentence=sentence))
            return Devices((Device("cpu", cpu, decided=True),), cpu.versions, tuple(findings))
        elif devices and not seen:
            sentence = (
                f"torch {cpu.versions['torch']} sees no GPU where NVML lists {len(devices)}: "
                f"the driver ({report.driver or 'version unknown'}) may be too old for its CUDA"
            )
            findings.append(Finding(level="degraded", sentence=sentence))
    if not devices:
        findings.append(_no_gpu(report))
    if not any(device.decided for device in devices):
        devices.append(Device("cpu", cpu, decided=True))
    return Devices(tuple(devices), cpu.versions, tuple(findings))


def _count_of_torch(torch: ModuleType) -> tuple[int, str]:
    """How many GPUs torch counts, which starts no CUDA context, or what keeps it from counting."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what NVML has to say was said by `list_gpus`
            return int(torch.cuda.device_count()), ""
    except (RuntimeError, OSError) as error:
        return 0, f"torch cannot count the GPUs ({_first_line(error)})"


def _of_nvml(base: Machine, gpu: Gpu, index: int, decided: bool) -> Device:
    machine = replace(
        base,
        device_type="cuda",
        device_name=gpu.name,
        capability=gpu.capability,
        driver=gpu.driver,
        memory_bytes=gpu.memory_bytes,
        mig=gpu.mig,
        uuid=gpu.uuid,
    )
    return Device(f"cuda:{index}", machine, decided)


def _nvml_findings(report: GpuReport) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    if report.problem and report.gpus:  # without any GPU it says why, and is no second finding
        findings.append(Finding(level="degraded", sentence=report.problem))
    elif len({gpu.name for gpu in report.gpus}) > 1:
        sentence = (
            "the GPUs here differ and are numbered as NVML does, which CUDA does only with "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID: --probe numbers them as CUDA does"
        )
        findings.append(Finding(level="note", sentence=sentence))
    return tuple(findings)


def _no_gpu(report: GpuReport) -> Finding:
    why = report.problem or "NVML lists none that this process may see"
    return Finding(level="no gpu", sentence=f"no GPU was found: {why}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
