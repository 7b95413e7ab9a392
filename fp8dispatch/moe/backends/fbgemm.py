"""FBGEMM GenAI's grouped GEMMs; see `fp8dispatch.moe.backends.fbgemm_family`."""

from __future__ import annotations

from fp8dispatch.backends.fbgemm import BACKEND as LINEAR
from fp8dispatch.moe.backends.fbgemm_family import FbgemmFamilyExperts


class Fbgemm(FbgemmFamilyExperts):
    """Grouped CUTLASS kernels of FBGEMM GenAI."""

    name = "fbgemm"
    linear = LINEAR
    distributions = LINEAR.distributions


BACKEND = Fbgemm()
