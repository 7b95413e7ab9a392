"""The libraries that matter: found, the torch they need, and the line that installs what fits."""

from __future__ import annotations

from collections.abc import Mapping

from fp8dispatch.doctor.report import LibraryRecord
from fp8dispatch.machine import parse_version
from fp8dispatch.probes.packages import DISTRIBUTIONS, install_hint, paired_torch

# One of each library, in the spelling to install; others of its names are listed where installed.
_ALWAYS = ("torch", "triton", "fbgemm-gpu-genai", "mslk-cuda", "torchao", "sgl-deep-gemm")
# The same kernels under another name: where one is installed, the first one is not missing.
_SAME = {
    "triton": ("pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"),
    "fbgemm-gpu-genai": ("fbgemm-gpu-genai-nightly", "fbgemm-gpu-nightly-genai"),
    "mslk-cuda": ("mslk", "mslk-cuda-nightly"),
    "torchao": ("torchao-nightly",),
}


def describe_libraries(versions: Mapping[str, str]) -> tuple[LibraryRecord, ...]:
    """One entry for each library that has FP8 GEMMs, and for what else is installed around them.

    Args:
        versions: distribution name -> version text of what is installed.
    """
    torch_version = versions.get("torch", "")
    return tuple(
        _describe(name, versions.get(name), torch_version)
        for name in DISTRIBUTIONS
        if name in versions
        or (name in _ALWAYS and not any(other in versions for other in _SAME.get(name, ())))
    )


def _describe(name: str, found: str | None, torch_version: str) -> LibraryRecord:
    paired = None if found is None else paired_torch(name, found)
    torch = parse_version(torch_version)
    fits = paired is None or (torch is not None and f"{torch.major}.{torch.minor}" == paired)
    return LibraryRecord(
        name=name,
        found=found,
        needs="" if paired is None else f"torch {paired}",
        fits=found is not None and fits,
        install="" if found is not None and fits else install_hint(name, torch_version),
    )
