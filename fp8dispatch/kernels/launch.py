"""What a launcher needs to know about the place where its tensors live.

Facts are asked once per device and kept. Under Triton's interpreter tensors are on the CPU; the
limits returned there are small on purpose, so that a persistent loop runs more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """The numbers that a tile choice depends on.

    Attributes:
        capability: NVIDIA compute capability, ``(0, 0)`` on other devices.
        multiprocessors: Number of SMs.
        shared_memory: Bytes of shared memory that one program may ask for.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


FP_FUSION = False
"""Compile option of every launch: no multiplication and addition merge unless a kernel says so.

The quantisers promise IEEE results, and Triton 3.9 warns that its own default is about to change.
"""

Launch = Callable[[Any, int, Sequence[Any], dict[str, Any], int], None]
"""Kernel, programs, arguments (tensors and integers), constexpr arguments after them, warps."""


def plain_launch(
    kernel: Any, programs: int, arguments: Sequence[Any], constants: dict[str, Any], warps: int
) -> None:
    """Triton's own launch."""
    options = {**constants, "num_warps": warps, "enable_fp_fusion": FP_FUSION}
    kernel[(programs,)](*arguments, **options)


INTERPRETER_LIMITS = DeviceLimits(capability=(0, 0), multiprocessors=3, shared_memory=101_376)


def device_limits(device: torch.device) -> DeviceLimits:
    """Return the limits of `device`."""
    if device.type != "cuda":
        return INTERPRETER_LIMITS
    return _cuda_limits(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_limits(index: int) -> DeviceLimits:
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    return DeviceLimits(
        # An AMD GPU has numbers of its own here, which mean nothing beside NVIDIA's.
        capability=(0, 0) if hip else (properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        # ROCm builds leave the attribute out; every AMD GPU has 64 KiB.
        shared_memory=int(getattr(properties, "shared_memory_per_block_optin", 65_536)),
    )


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the device of `tensor` current, because Triton launches on the current device."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.get_device())
    return nullcontext()


def ceil_div(value: int, divisor: int) -> int:
    """Return ``ceil(value / divisor)`` of non-negative integers."""
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    """Return the smallest power of two that is at least `value` (1 for 0)."""
    return 1 << max(value - 1, 0).bit_length()
