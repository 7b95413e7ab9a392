"""FP8 formats and E8M0 scales: their limits, and how a scale tensor becomes fp32 multipliers.

One convention holds inside the whole library: a scale is the multiplier that restores the value,
``value = data * scale``. Quantisation therefore uses ``scale = amax / max_value(dtype)``.

| dtype           | exponent, mantissa bits | largest finite | infinities | NaN codes      |
|-----------------|-------------------------|----------------|------------|----------------|
| float8_e4m3fn   | 4, 3                    | 448            | no         | 0x7f, 0xff     |
| float8_e5m2     | 5, 2                    | 57344          | yes        | 0x7d..0x7f ... |
| float8_e4m3fnuz | 4, 3                    | 240            | no         | 0x80           |
| float8_e5m2fnuz | 5, 2                    | 57344          | no         | 0x80           |

Sources: "FP8 Formats for Deep Learning" (arXiv:2209.05433) for the first two, LLVM's
Float8E4M3FNUZ and Float8E5M2FNUZ for the others, the OCP MX specification 1.0 for E8M0.
"""

from __future__ import annotations

import torch

from fp8dispatch.problem import FLOAT8_NAMES

FLOAT8_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in FLOAT8_NAMES)
FNUZ_DTYPES: tuple[torch.dtype, ...] = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
ACTIVATION_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
SCALE_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e8m0fnu,
    torch.uint8,
)

AMAX_FLOOR = 1e-12
"""Smallest amax that a scale is computed from; an amax of exactly zero gives the scale 1."""

E8M0_NAN = 255
E8M0_BIAS = 127


def max_value(dtype: torch.dtype) -> float:
    """Largest finite value of an FP8 dtype: 448, 57344, 240 or 57344."""
    return float(torch.finfo(dtype).max)


def dtype_name(dtype: torch.dtype) -> str:
    """``"float8_e4m3fn"`` for ``torch.float8_e4m3fn``: the name used in plain data and messages."""
    return str(dtype).removeprefix("torch.")


def activation_float8(weight_dtype: torch.dtype) -> torch.dtype:
    """The FP8 dtype that activations take beside a weight: E4M3 of the weight's family.

    FNUZ hardware multiplies FNUZ by FNUZ only, so FNUZ weights pair with FNUZ activations.
    """
    return torch.float8_e4m3fnuz if weight_dtype in FNUZ_DTYPES else torch.float8_e4m3fn


def decode_e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """E8M0 exponents (uint8 or float8_e8m0fnu, any shape) as fp32 powers of two.

    Byte ``e`` means ``2 ** (e - 127)`` and 255 means NaN. Byte 0 is ``2 ** -127``, a subnormal
    of fp32, so the exponent is not simply shifted into place.
    """
    raw = exponents.view(torch.uint8) if exponents.dtype != torch.uint8 else exponents
    exponent = raw.to(torch.int32)
    bits = torch.where(exponent == 0, 1 << 22, exponent << 23)
    bits = torch.where(exponent == E8M0_NAN, 0x7FC00000, bits)
    return bits.to(torch.int32).view(torch.float32)


def decode_scale(scale: torch.Tensor) -> torch.Tensor:
    """A scale of any supported dtype as fp32 multipliers of the same shape; fp32 is not copied."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return decode_e8m0(scale)
    return scale.to(torch.float32)


def round_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Store fp32 multipliers in `dtype`; the data must then be quantised with the stored value.

    E8M0 rounds up to a power of two, so that ``amax / scale`` never exceeds the format's maximum.
    fp16 and bf16 round to nearest, and the quantiser clamps what that pushes over the maximum.

    Args:
        scale: positive finite fp32, any shape.
        dtype: one of `SCALE_DTYPES`.
    """
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa >= 0.5
        power = torch.where(mantissa == 0.5, exponent - 1, exponent)
        stored = (power + E8M0_BIAS).clamp(0, E8M0_NAN - 1).to(torch.uint8)
        return stored if dtype == torch.uint8 else stored.view(torch.float8_e8m0fnu)
    # Without the floor a small fp16 scale would become 0, and the division by it infinite.
    return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype)
