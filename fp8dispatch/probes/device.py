"""What the device of a tensor is, as `fp8dispatch.machine.Machine`; asked once per device."""

from __future__ import annotations

import functools

import torch

from fp8dispatch import policy
from fp8dispatch.kernels.requirements import refuse_machine
from fp8dispatch.machine import Machine
from fp8dispatch.probes.packages import installed_versions


@functools.cache
def describe(device: torch.device) -> Machine:
    """The machine around one device.

    A tensor on a CUDA device has started CUDA already, so asking torch costs no new context.
    """
    versions = dict(installed_versions())
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    if torch.version.hip is not None:
        versions["hip"] = torch.version.hip
    interpreter = policy.triton_interpreter()
    if device.type != "cuda":
        return Machine(device.type, device.type, None, versions, interpreter)
    return Machine(
        device.type,
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        versions,
        interpreter,
    )


@functools.cache
def runs_kernels(device: torch.device) -> bool:
    """Our Triton kernels run on this device, compiled (the interpreter does not count)."""
    return device.type == "cuda" and not refuse_machine(describe(device))
