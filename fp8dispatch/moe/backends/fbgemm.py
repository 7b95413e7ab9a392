"""FBGEMM GenAI's grouped GEMMs; see `fp8dispatch.moe.backends.fbgemm_family`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fp8dispatch.backends.fbgemm import BACKEND as LINEAR
from fp8dispatch.moe.backends.fbgemm_family import FbgemmFamilyExperts


class Fbgemm(FbgemmFamilyExperts):
    """Grouped CUTLASS kernels of FBGEMM GenAI."""

    name = "fbgemm"
    verified_capabilities: ClassVar[tuple[tuple[int, int], ...]] = ((9, 0),)
    verified_versions: ClassVar[Mapping[str, tuple[str, ...]]] = {"fbgemm-gpu-genai": ("1.6.0",)}
    linear = LINEAR
    distributions = LINEAR.distributions


BACKEND = Fbgemm()
