"""FBGEMM's FP8 GEMMs, from the distribution ``fbgemm-gpu-genai``; see `fbgemm_family`.

``fbgemm-gpu`` stopped carrying these kernels at 1.2.0. Before 1.4.0 the block kernel computed wrong
numbers (pytorch/FBGEMM#5002).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fp8dispatch.backends.fbgemm_family import FbgemmFamily


class Fbgemm(FbgemmFamily):
    """CUTLASS kernels of FBGEMM GenAI."""

    name = "fbgemm"
    namespace = "fbgemm"
    other_namespace = "mslk"
    module = "fbgemm_gpu.experimental.gen_ai"
    needs_to_load = "fbgemm-gpu-genai to load into this torch"
    distributions = (
        "fbgemm-gpu-genai",
        "fbgemm-gpu-genai-nightly",
        "fbgemm-gpu-nightly-genai",
    )
    lookalikes: ClassVar = {"fbgemm-gpu": "which carries no FP8 GEMMs since 1.2.0"}
    first_release = (1, 2)
    block_since = (1, 4)
    blackwell_since = (1, 5)  # the wheel of 1.4.2 has code for 8.0 and 9.0 alone
    verified_capabilities: ClassVar[tuple[tuple[int, int], ...]] = ((9, 0),)
    verified_versions: ClassVar[Mapping[str, tuple[str, ...]]] = {"fbgemm-gpu-genai": ("1.6.0",)}


BACKEND = Fbgemm()
