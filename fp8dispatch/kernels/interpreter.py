"""Where Triton's interpreter differs from its compiler, and how kernels cope.

Without a GPU the kernels run under the interpreter (NumPy on the CPU), for tests and for checking
numbers. Three of its operations give other results than the compiled ones (Triton 3.6 to 3.9):

- float32 to bfloat16 truncates instead of rounding to nearest even: `cast_output` rounds first;
- conversions to and from FP8 are wrong for NaN codes and ties: `float8` works on bytes there;
- ``tl.fma`` rounds twice: code that needs the single rounding asks for `INTERPRETED`.

Triton decides when it decorates a function whether to interpret it, so that is what is asked here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _decorated():
    pass


INTERPRETED = tl.constexpr(not isinstance(_decorated, triton.JITFunction))


@triton.jit
def cast_output(value, dtype: tl.constexpr):
    """Round float32 values once, to nearest even, to a floating `dtype`."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
        value = tl.where(finite, rounded, bits).to(tl.float32, bitcast=True)
    return value.to(dtype)
