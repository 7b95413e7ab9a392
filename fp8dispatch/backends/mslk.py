"""MSLK's FP8 GEMMs: FBGEMM GenAI's kernels under their new name; see `fbgemm_family`.

On PyPI the distribution is ``mslk-cuda`` (``mslk`` there is an empty 0.0.0); on PyTorch's wheel
index it is ``mslk``. TorchAO imports MSLK by itself where it is installed; where both this and
FBGEMM are, only one of them is loaded into a process.
"""

from __future__ import annotations

from typing import ClassVar

from fp8dispatch.backends.fbgemm_family import FbgemmFamily


class Mslk(FbgemmFamily):
    """CUTLASS kernels of MSLK."""

    name = "mslk"
    namespace = "mslk"
    other_namespace = "fbgemm"
    module = "mslk"
    needs_to_load = "mslk to load into this torch"
    distributions = ("mslk-cuda", "mslk", "mslk-cuda-nightly")
    lookalikes: ClassVar = {
        "mslk": "an empty placeholder",
        "mslk-cuda": "an empty placeholder",
    }
    first_release = (1, 0)
    block_since = (1, 0)
    blackwell_since = (1, 0)


BACKEND = Mslk()
