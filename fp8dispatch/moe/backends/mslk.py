"""MSLK's grouped GEMMs; see `fp8dispatch.moe.backends.fbgemm_family`."""

from __future__ import annotations

from fp8dispatch.backends.mslk import BACKEND as LINEAR
from fp8dispatch.moe.backends.fbgemm_family import FbgemmFamilyExperts


class Mslk(FbgemmFamilyExperts):
    """Grouped CUTLASS kernels of MSLK."""

    name = "mslk"
    linear = LINEAR
    distributions = LINEAR.distributions


BACKEND = Mslk()
