"""Which devices to ask about: those that NVML lists, those of torch, or one of the gallery.

Torch is imported for probing alone: that takes longer than all the rest of a report.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType

from fp8dispatch import policy
from fp8dispatch.doctor.report import Finding
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.machine import Machine
from fp8dispatch.probes.gallery import simulated
from fp8dispatch.probes.gpu import Gpu, GpuReport, list_gpus
from fp8dispatch.probes.packages import installed_versions
from fp8dispatch.probes.torch_build import TorchBuild, read_torch_build

# The first driver branch that runs a major release of CUDA; NVIDIA's "CUDA Compatibility",
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html.
_FIRST_DRIVER = {"12": 525, "13": 580}


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


def find_devices(*, machine: str | None, index: int | None, probe: bool) -> Devices:
    """The devices to ask about.

    Args:
        machine: a name of the gallery, to ask about that and nothing here.
        index: the one GPU to ask about, as CUDA counts them; None asks about all.
        probe: import torch and ask it, which starts CUDA, instead of NVML and torch's files alone.

    Raises:
        InvalidInputError: no machine of that name, no GPU of that number.
    """
    if machine is not None:
        stand_in = simulated(machine)
        device = Device(machine, stand_in, decided=True, simulated=True)
        return Devices((device,), stand_in.versions)
    report = list_gpus()
    found = _probed(report) if probe else _listed(report)
    gpus = [device for device in found.devices if device.machine.device_type == "cuda"]
    if index is None or not gpus:
        return found
    if not 0 <= index < len(gpus):
        raise InvalidInputError(
            f"--device must be the number of a visible GPU, 0 to {len(gpus) - 1}, found {index}"
        )
    return replace(found, devices=(gpus[index],))


def _listed(report: GpuReport) -> Devices:
    """What NVML lists, beside the torch whose files are here; nothing is imported."""
    build = read_torch_build()
    if build.problem is not None:
        return _undecided(report, build.problem)
    versions = {**installed_versions(), **build.versions()}
    cpu = Machine("cpu", "cpu", None, versions, policy.triton_interpreter())
    devices = [_of_nvml(cpu, gpu, index, True) for index, gpu in enumerate(report.gpus)]
    findings: list[Finding] = []
    if devices and _built_for_gpus(cpu):
        findings += _driver_findings(report.driver, build)
    elif not devices:
        kind = f"CUDA {build.cuda}" if build.cuda else f"ROCm {build.hip}" if build.hip else ""
        findings.append(_no_gpu(report, f"; --probe asks torch, built for {kind}" if kind else ""))
    return _with_cpu(report, devices, cpu, findings)


def _probed(report: GpuReport) -> Devices:
    """What torch runs on."""
    try:
        torch = import_module("torch")
    except Exception as error:  # noqa: BLE001  # a broken build raises anything: that is the finding
        return _undecided(report, _first_line(error))
    from fp8dispatch.probes.device import describe

    cpu = describe(torch.device("cpu"))
    devices = [_of_nvml(cpu, gpu, index, True) for index, gpu in enumerate(report.gpus)]
    problem = ""
    if _built_for_gpus(cpu):
        seen, problem = _count_of_torch(torch)
        try:
            if seen:
                devices = [
                    Device(f"cuda:{index}", describe(torch.device("cuda", index)), decided=True)
                    for index in range(seen)
                ]
            elif devices and not problem:
                problem = (
                    f"torch {cpu.versions['torch']} sees no GPU where NVML lists {len(devices)}: "
                    f"the driver ({report.driver or 'version unknown'}) may be too old for its CUDA"
                )
        except RuntimeError as error:  # CUDA does not start: a busy or broken device
            problem = f"torch cannot start CUDA ({_first_line(error)})"
    findings = [Finding(level="degraded", sentence=problem)] if problem else []
    if not devices:
        findings.append(_no_gpu(report))
    return _with_cpu(report, devices, cpu, findings)


def _undecided(report: GpuReport, problem: str) -> Devices:
    """What NVML lists, where torch cannot be imported."""
    versions = {**installed_versions(), **read_torch_build().versions()}
    base = Machine("cpu", "cpu", None, versions)
    devices = [_of_nvml(base, gpu, index, False) for index, gpu in enumerate(report.gpus)]
    sentence = (
        f"backends, routes and verdicts need torch, and it cannot be imported ({problem}): "
        f"install it anew to see them"
    )
    return Devices(
        tuple(devices) or (Device("cpu", base, decided=False),),
        versions,
        (
            *_nvml_findings(report),
            *(() if devices else (_no_gpu(report),)),
            Finding(level="degraded", sentence=sentence),
        ),
    )


def _with_cpu(
    report: GpuReport, devices: list[Device], cpu: Machine, findings: list[Finding]
) -> Devices:
    """The GPUs where this torch can use them; else the CPU, which is where calls then run."""
    found = list(_nvml_findings(report))
    if devices and not _built_for_gpus(cpu):
        devices = [replace(device, decided=False) for device in devices]
        sentence = (
            f"a GPU needs a CUDA build of torch to be used, found torch {cpu.versions['torch']}: "
            f"install one from https://pytorch.org"
        )
        found.append(Finding(level="degraded", sentence=sentence))
    if not any(device.decided for device in devices):
        devices = [*devices, Device("cpu", cpu, decided=True)]
    return Devices(tuple(devices), cpu.versions, (*found, *findings))


def _built_for_gpus(machine: Machine) -> bool:
    return "cuda" in machine.versions or machine.is_rocm


def _driver_findings(driver: str, build: TorchBuild) -> tuple[Finding, ...]:
    """A driver that is older than the CUDA of this torch needs."""
    branch = driver.partition(".")[0]
    needed = _FIRST_DRIVER.get((build.cuda or "").partition(".")[0])
    if needed is None or not branch.isdecimal() or int(branch) >= needed:
        return ()
    sentence = (
        f"torch {build.version} needs a driver of {needed} or later for CUDA {build.cuda} (or "
        f"CUDA's forward compatibility package), found {driver}: update the driver, or see with "
        f"--probe whether CUDA starts"
    )
    return (Finding(level="degraded", sentence=sentence),)


def _count_of_torch(torch: ModuleType) -> tuple[int, str]:
    """How many GPUs torch counts, or what keeps it from counting."""
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


def _no_gpu(report: GpuReport, hint: str = "") -> Finding:
    why = report.problem or "NVML lists none that this process may see"
    return Finding(level="no gpu", sentence=f"no GPU was found: {why}{hint}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
