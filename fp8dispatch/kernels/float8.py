"""FP8 bytes in integer arithmetic, for GPUs and formats without FP8 instructions.

Triton converts FP8 itself only where the hardware does (NVIDIA capability 8.9 and later, the two
OCP formats). Everywhere else a tensor is viewed as uint8 and these functions do the work: compute
capability 8.0, the FNUZ formats on NVIDIA, and Triton's interpreter, whose own conversions are
wrong for NaN codes and for rounding to E4M3.

Decoding gives float16, which holds every value of all four formats exactly. Encoding rounds to
nearest even exactly as torch's cast of an in-range value does. Neither depends on whether the
device flushes float32 subnormals to zero: decoding never makes one, and encoding meets one only
where the result is zero anyway.

A format is a ``tl.constexpr`` code, so each kernel is compiled for its formats and no table is read
at run time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8dispatch.kernels.interpreter import INTERPRETED
from fp8dispatch.kernels.launch import device_limits

E4M3FN = tl.constexpr(0)
E5M2 = tl.constexpr(1)
E4M3FNUZ = tl.constexpr(2)
E5M2FNUZ = tl.constexpr(3)
NATIVE = tl.constexpr(-1)  # the tensor keeps its FP8 dtype and Triton converts it
WIDE = tl.constexpr(-2)  # no FP8: bfloat16, float16 or float32, taken as it is

# By format code. The largest finite values are `fp8dispatch.formats.max_value`.
MANTISSA_BITS = tl.constexpr((3, 2, 3, 2))
EXPONENT_BIAS = tl.constexpr((7, 15, 8, 16))

FORMAT_CODES: dict[torch.dtype, int] = {
    torch.float8_e4m3fn: E4M3FN.value,
    torch.float8_e5m2: E5M2.value,
    torch.float8_e4m3fnuz: E4M3FNUZ.value,
    torch.float8_e5m2fnuz: E5M2FNUZ.value,
}

_NATIVE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_NATIVE_CAPABILITY = (8, 9)


def native_float8(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether Triton can load, convert and multiply `dtype` on `device` by itself.

    Args:
        dtype: One of the four FP8 dtypes of torch.
        device: Where the kernel will run.

    Returns:
        True on NVIDIA capability 8.9 and later for float8_e4m3fn and float8_e5m2; False elsewhere,
        and in Triton's interpreter.
    """
    if INTERPRETED.value or device.type != "cuda" or torch.version.hip is not None:
        return False
    return dtype in _NATIVE_DTYPES and device_limits(device).capability >= _NATIVE_CAPABILITY


def kernel_operand(tensor: torch.Tensor, *, native: bool = True) -> tuple[torch.Tensor, int]:
    """Return what a kernel is given for an FP8 tensor: itself, or its bytes and a format code.

    Args:
        tensor: Any shape and strides, one of the four FP8 dtypes.
        native: False asks for the bytes in any case.

    Returns:
        ``(tensor, NATIVE)`` where `native_float8`, else ``(uint8 view, format code)``. No copy.
    """
    if native and native_float8(tensor.dtype, tensor.device):
        return tensor, NATIVE.value
    return tensor.view(torch.uint8), FORMAT_CODES[tensor.dtype]


@triton.jit
def decode_float8(byte, FORMAT: tl.constexpr):
    """Turn uint8 codes into the float16 values that they stand for, exactly.

    The float16 bits are the code's own, moved, with the exponent bias corrected. A subnormal code
    of a 3-bit format is a normal float16: it is read as (1 + m/8) * 2^e and 2^e is taken away.
    """
    magnitude = byte.to(tl.int16) & 0x7F
    sign = (byte.to(tl.int16) & 0x80) << 8
    if FORMAT == E5M2:  # the upper half of a float16
        value = (sign | (magnitude << 8)).to(tl.float16, bitcast=True)
    elif FORMAT == E5M2FNUZ:  # one below float16's bias: codes up to 7 are subnormal there
        bits = tl.where(magnitude < 8, magnitude << 7, (magnitude << 8) - 0x0400)
        bits = tl.where((sign != 0) & (magnitude == 0), 0x7E00, sign | bits).to(tl.int16)
        value = bits.to(tl.float16, bitcast=True)
    else:
        if FORMAT == E4M3FN:
            REBIAS: tl.constexpr = 8 << 10
            SMALLEST_NORMAL: tl.constexpr = 0.015625  # 2^-6
            nan = magnitude == 0x7F
        else:
            REBIAS: tl.constexpr = 7 << 10
            SMALLEST_NORMAL: tl.constexpr = 0.0078125  # 2^-7
            nan = (sign != 0) & (magnitude == 0)
        subnormal = magnitude < 8
        bits = (magnitude << 7) + tl.where(subnormal, REBIAS + 0x0400, REBIAS)
        absolute = bits.to(tl.int16).to(tl.float16, bitcast=True)
        absolute = tl.where(subnormal, absolute - SMALLEST_NORMAL, absolute).to(tl.float16)
        bits = sign | absolute.to(tl.int16, bitcast=True)
        value = tl.where(nan, 0x7E00, bits).to(tl.int16).to(tl.float16, bitcast=True)
    return value


@triton.jit
def encode_float8(x, FORMAT: tl.constexpr):
    """Round float32 values, already within the finite range of the format or NaN, to FP8 codes.

    Nearest even. In the normal range the dropped bits are rounded in integers; below it, adding a
    power of two whose last bit is the format's smallest step makes the float32 adder round.
    """
    MANTISSA: tl.constexpr = MANTISSA_BITS[FORMAT]
    BIAS: tl.constexpr = EXPONENT_BIAS[FORMAT]
    DROPPED: tl.constexpr = 23 - MANTISSA
    STEP_BITS: tl.constexpr = (128 - BIAS + DROPPED) << 23  # 2^(1 - BIAS - MANTISSA + 23)
    SMALLEST_NORMAL_BITS: tl.constexpr = (128 - BIAS) << 23

    bits = x.to(tl.int32, bitcast=True)
    absolute = bits & 0x7FFFFFFF
    rounded = absolute + ((1 << (DROPPED - 1)) - 1) + ((absolute >> DROPPED) & 1)
    normal = (rounded >> DROPPED) - ((127 - BIAS) << MANTISSA)
    step = tl.full(absolute.shape, STEP_BITS, tl.int32).to(tl.float32, bitcast=True)
    subnormal = absolute < SMALLEST_NORMAL_BITS
    small = tl.where(subnormal, absolute, 0).to(tl.float32, bitcast=True)
    subnormal_code = (small + step).to(tl.int32, bitcast=True) - STEP_BITS
    magnitude = tl.where(subnormal, subnormal_code, normal)
    sign = (bits >> 24) & 0x80
    nan = absolute > 0x7F800000
    if FORMAT >= E4M3FNUZ:  # both FNUZ formats: one zero, and the code of -0 is the only NaN
        code = tl.where(magnitude == 0, 0, magnitude | sign)
        code = tl.where(nan, 0x80, code)
    else:
        code = tl.where(nan, 0x7F, magnitude) | sign
    return code.to(tl.uint8)
