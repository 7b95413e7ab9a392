"""What the device of a tensor is, as `fp8dispatch.machine.Machine`; asked once per device."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8dispatch import policy
from fp8dispatch.kernels.requirements import refuse_machine
from fp8dispatch.machine import Machine
from fp8dispatch.probes.gpu import find_gpu
from fp8dispatch.probes.packages import installed_versions
from fp8dispatch.probes.torch_build import TorchBuild

if TYPE_CHECKING:
    import torch


def describe(device: torch.device) -> Machine:
    """The machine around one device.

    A tensor on a CUDA device has started CUDA already, so asking torch costs no new context.
    ``torch.device("cuda")`` is the device that is current now.
    """
    if device.type == "cuda" and device.index is None:
        import torch

        device = torch.device("cuda", torch.cuda.current_device())
    return _describe(device)


@functools.cache
def _describe(device: torch.device) -> Machine:
    import torch

    # Torch's own version has the local suffix that PyPI's metadata leaves out.
    build = TorchBuild(str(torch.__version__), torch.version.cuda, torch.version.hip)
    versions = {**installed_versions(), **build.versions()}
    interpreter = policy.triton_interpreter()
    if device.type != "cuda":
        return Machine(device.type, device.type, None, versions, interpreter)
    # Torch's own facts come first, since they are what runs. NVML knows the driver; it numbers the
    # GPUs differently, so the two are joined by UUID. ROCm builds have no NVML.
    facts = torch.cuda.get_device_properties(device)
    uuid = str(facts.uuid)
    machine = Machine(
        device.type,
        facts.name,
        (facts.major, facts.minor),
        versions,
        interpreter,
        memory_bytes=facts.total_memory,
        mig=" MIG " in facts.name,
        uuid=uuid,
    )
    return machine if machine.is_rocm else _joined(machine)


def _joined(machine: Machine) -> Machine:
    """The same machine with what NVML knows of it.

    Where NVML does not know the device, the driver's version holds all the same: a host has one.
    """
    report = find_gpu(machine.uuid)
    if not report.gpus:
        prefix = "MIG-" if machine.mig else "GPU-"
        return replace(machine, driver=report.driver, uuid=prefix + machine.uuid)
    gpu = report.gpus[0]
    same = gpu.uuid.lower().endswith(machine.uuid.lower())
    return replace(
        machine,
        driver=report.driver,
        mig=gpu.mig,
        uuid=gpu.uuid if same else gpu.parent_uuid,  # torch gave that of the whole GPU
    )


@functools.cache
def runs_kernels(device: torch.device) -> bool:
    """Our Triton kernels run on the device of this tensor, compiled (not in the interpreter)."""
    return device.type == "cuda" and not refuse_machine(describe(device))
