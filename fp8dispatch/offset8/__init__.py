"""A uint8 codec around a shifted zero, with its scales, its GEMM and a trainable linear layer.

    q = round(clamp(x * scale, -448, 448) / 448 * 127) + 128        1 <= q <= 255, zero is 128
    x = (q - 128) / 127 * 448 / scale

It is linear: 254 equal steps from -448 to 448 before scaling, rounded to nearest even. The codec
is often called FP8, and borrows E4M3's limit of 448, but its bytes and E4M3's mean different
numbers. float8 tensors are therefore refused here, and `fp8dispatch.quantize` makes real FP8.

Its scale is the reciprocal of ours: it multiplies when quantising (``448 / amax``) and divides when
restoring. The convention stays inside this package.

The errors have the names and attributes of the codec's origin; `fp8dispatch.offset8.errors` draws
them. Three rules of the origin are wider here. Tensors may lie on any device that they share, and
may be strided: the origin refuses what is not contiguous CUDA memory, because its kernels read
addresses, while torch's operators read any layout, as everywhere in this library. And
`quantize_fp8_with_overflow_handling`, which the origin keeps in a module of its kernels, is
importable from here beside the function that it extends.
"""

from __future__ import annotations

from fp8dispatch.errors import NumericalOverflowError
from fp8dispatch.offset8.codec import (
    ZERO_CODE,
    dequantize_fp8,
    quantize_fp8,
    quantize_fp8_with_overflow_handling,
)
from fp8dispatch.offset8.compare import BaselineComparison, compare_to_baseline
from fp8dispatch.offset8.errors import (
    DeviceError,
    ShapeMismatchError,
    TritonKernelError,
    UnsupportedDtypeError,
)
from fp8dispatch.offset8.format import FP8_MAX, FP8Format
from fp8dispatch.offset8.gemm import fp8_gemm
from fp8dispatch.offset8.linear import FP8Linear

__all__ = [
    "FP8_MAX",
    "ZERO_CODE",
    "BaselineComparison",
    "DeviceError",
    "FP8Format",
    "FP8Linear",
    "NumericalOverflowError",
    "ShapeMismatchError",
    "TritonKernelError",
    "UnsupportedDtypeError",
    "compare_to_baseline",
    "dequantize_fp8",
    "fp8_gemm",
    "quantize_fp8",
    "quantize_fp8_with_overflow_handling",
]
