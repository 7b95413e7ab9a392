"""Plain torch on any device: the path where nothing else runs, and the one that is easy to trust.

FP8 codes are exact in fp32, TF32 and bf16 alike, so the products of raw codes are right whatever
``torch.set_float32_matmul_precision`` says; scales are applied to fp32 partial sums, one block of
K at a time. It is slow, never silent about it, and last in the order on a GPU.
"""

from __future__ import annotations

from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.problem import FLOAT8_NAMES


class Eager(Backend):
    """Dequantise a strip of K at a time and multiply in fp32."""

    name = "eager"
    weight_dtypes = frozenset(FLOAT8_NAMES)
    quantizes_with_kernels = False
    any_strides = True
    matmul = computed_in("fp8dispatch.backends.compute.eager")


BACKEND = Eager()
