"""Machines to stand in for: the GPUs that people have, by name, as `fp8dispatch.machine.Machine`.

What the doctor's ``--machine NAME`` and the tests route on. Names are what the driver reports,
memory is NVML's total (nvidia-smi's column, in MiB), capabilities are those of
https://developer.nvidia.com/cuda-gpus.
"""

from __future__ import annotations

from collections.abc import Mapping

from fp8dispatch.errors import InvalidInputError
from fp8dispatch.machine import Machine

_MIB = 1024**2

CUDA_LIBRARIES: Mapping[str, str] = {
    "torch": "2.11.0+cu130",  # PyPI's torch 2.11.0, with the triton and cuBLAS that it pins
    "cuda": "13.0",
    "triton": "3.6.0",
    "nvidia-cublas": "13.1.0.3",
    "fbgemm-gpu-genai": "1.6.0",  # the release, and the only one, that loads with torch 2.11
    "mslk-cuda": "1.1.0",  # the same
    "torchao": "0.18.0",  # takes any torch from 2.11 on
}
"""Every library that has FP8 GEMMs, in the versions that fit torch 2.11."""

_ROCM_LIBRARIES = {"torch": "2.11.0+rocm7.2", "hip": "7.2", "triton": "3.6.0", "torchao": "0.18.0"}
_CPU_LIBRARIES = {"torch": "2.11.0+cpu"}

_DRIVER = "580.159.04"
"""Of the R580 branch, the first that runs CUDA 13.0; the H200 here has it."""


def _nvidia(name: str, capability: tuple[int, int], mebibytes: int) -> Machine:
    return Machine(
        "cuda",
        name,
        capability,
        CUDA_LIBRARIES,
        driver=_DRIVER,
        memory_bytes=mebibytes * _MIB,
    )


_MACHINES: Mapping[str, Machine] = {
    "a100": _nvidia("NVIDIA A100-SXM4-80GB", (8, 0), 81_920),  # nvidia-smi
    "l40s": _nvidia("NVIDIA L40S", (8, 9), 46_068),  # nvidia-smi: 48 GB less its ECC
    "rtx-4090": _nvidia("NVIDIA GeForce RTX 4090", (8, 9), 24_564),  # nvidia-smi
    "h100": _nvidia("NVIDIA H100 80GB HBM3", (9, 0), 81_559),  # nvidia-smi, the SXM5 board
    "h200": _nvidia("NVIDIA H200", (9, 0), 143_771),  # measured: nvidia-smi of our machine
    "b200": _nvidia("NVIDIA B200", (10, 0), 183_359),  # nvidia-smi
    # The name as in NVIDIA/cosmos-framework#114; memory from nvidia-smi.
    "b300": _nvidia("NVIDIA B300 SXM6 AC", (10, 3), 275_040),
    "rtx-5090": _nvidia("NVIDIA GeForce RTX 5090", (12, 0), 32_607),  # nvidia-smi
    # Name and capability as in antirez/ds4#256 (the Server Edition there); memory from nvidia-smi.
    "rtx-pro-6000": _nvidia("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 97_887),
    # DGX Spark shares the CPU's memory and NVML reports none: leptonai/gpud#1170 counts
    # 128,501,256,192 bytes of it, 122,548 MiB.
    "gb10": _nvidia("NVIDIA GB10", (12, 1), 122_548),
    # gfx942, which torch reports as capability 9.4 with 196592 MB: pytorch/ao#2853.
    "mi300x": Machine(
        "cuda",
        "AMD Instinct MI300X",
        (9, 4),
        _ROCM_LIBRARIES,
        memory_bytes=196_592 * _MIB,
    ),
    "cpu": Machine("cpu", "cpu", None, _CPU_LIBRARIES),
}

NAMES: tuple[str, ...] = tuple(_MACHINES)


def simulated(name: str, versions: Mapping[str, str | None] | None = None) -> Machine:
    """A machine by its name in `NAMES`; nothing here is asked about this one.

    Args:
        name: such as ``"rtx-4090"``; capitals, spaces and underscores are forgiven.
        versions: distribution name -> version to have instead; None takes the distribution away.

    Raises:
        InvalidInputError: no machine of that name.
    """
    machine = _MACHINES.get(name.strip().lower().replace(" ", "-").replace("_", "-"))
    if machine is None:
        raise InvalidInputError(f"a machine must be one of {', '.join(NAMES)}, found {name!r}")
    installed = {**machine.versions, **(versions or {})}
    return Machine(
        machine.device_type,
        machine.device_name,
        machine.capability,
        {library: version for library, version in installed.items() if version is not None},
        driver=machine.driver,
        memory_bytes=machine.memory_bytes,
    )
