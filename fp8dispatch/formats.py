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

Rounding and overflow are defined here and do not depend on the version of torch: values are
clamped to the largest finite one, rounded to nearest even, and NaN stays NaN (`cast`). `encode`
and `decode` do the same on raw bytes.
"""

from __future__ import annotations

from typing import Literal

import torch

from fp8dispatch.errors import (
    DTypeError,
    InvalidInputError,
    NumericalOverflowError,
    ScaleValueError,
)
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

NonFinite = Literal["raise", "saturate"]
"""What happens to NaN and infinity: an error, or ± the largest finite value (NaN stays NaN)."""

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


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values as FP8: clamped to the format's range, to nearest even; NaN stays NaN.

    The clamp comes first because torch versions differ in what an overflowing cast gives (2.11:
    NaN, 2.13: the largest finite value).
    """
    limit = max_value(dtype)
    return values.clamp(-limit, limit).to(dtype)


def encode(
    values: torch.Tensor, dtype: torch.dtype, *, nonfinite: NonFinite = "raise"
) -> torch.Tensor:
    """The raw bytes of values in an FP8 format or in E8M0, without any scale.

    FP8: beyond the largest finite value it saturates, in between it rounds to nearest even. The
    FNUZ formats have no negative zero, and E5M2's infinities are never written. E8M0: rounds up to
    a power of two, from ``2 ** -127`` to ``2 ** 127``.

    Args:
        values: any shape, bfloat16, float16 or float32.
        dtype: one of `FLOAT8_DTYPES`, or ``torch.float8_e8m0fnu``.
        nonfinite: ``"raise"``, or ``"saturate"`` as the OCP FP8 specification has it: infinities
            become the largest finite value of their sign and NaN stays NaN (one code, with the
            sign bit clear where the format has two).

    Returns:
        uint8 of the same shape.

    Raises:
        DTypeError, InvalidInputError: arguments that do not fit.
        NumericalOverflowError: NaN or infinity, unless they saturate.
        ScaleValueError: E8M0 of zero or of a negative value.
    """
    _check_format(dtype)
    check_nonfinite(nonfinite)
    if not isinstance(values, torch.Tensor) or values.dtype not in ACTIVATION_DTYPES:
        raise DTypeError(
            f"values must be a bfloat16, float16 or float32 tensor, found {_kind(values)}; convert "
            f"it first, so that rounding twice is your choice"
        )
    wide = values.detach().to(torch.float32)
    if nonfinite == "raise" and not bool(torch.isfinite(wide).all()):
        raise NumericalOverflowError(
            f"{dtype_name(dtype)} is made from finite values, found NaN or infinity; repair them "
            f"or pass nonfinite='saturate'"
        )
    nan = torch.isnan(wide)
    if dtype == torch.float8_e8m0fnu:
        if bool((wide <= 0).any()):
            raise ScaleValueError(
                "E8M0 holds powers of two, found zero or a negative value; use 1 as the scale of "
                "zeros"
            )
        finite = torch.where(nan, 1.0, wide.clamp(max=torch.finfo(torch.float32).max))
        return torch.where(nan, E8M0_NAN, round_scale(finite, torch.uint8))
    # Which of its two codes a NaN takes would depend on its sign, which differs by processor.
    return cast(torch.where(nan, torch.nan, wide), dtype).view(torch.uint8)


def decode(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The fp32 values of raw FP8 or E8M0 bytes, exactly.

    Args:
        codes: uint8, any shape.
        dtype: one of `FLOAT8_DTYPES`, or ``torch.float8_e8m0fnu``.

    Raises:
        DTypeError: arguments that do not fit.
    """
    _check_format(dtype)
    if not isinstance(codes, torch.Tensor) or codes.dtype != torch.uint8:
        raise DTypeError(
            f"codes must be uint8 bytes, found {_kind(codes)}; view them as torch.uint8"
        )
    if dtype == torch.float8_e8m0fnu:
        return decode_e8m0(codes)
    return codes.contiguous().view(dtype).to(torch.float32)


def check_nonfinite(choice: object) -> None:
    """One of the two answers to NaN and infinity.

    Raises:
        InvalidInputError: anything else.
    """
    if choice not in ("raise", "saturate"):
        raise InvalidInputError(f"nonfinite must be 'raise' or 'saturate', found {choice!r}")


def _check_format(dtype: object) -> None:
    if dtype not in (*FLOAT8_DTYPES, torch.float8_e8m0fnu):
        names = ", ".join(dtype_name(known) for known in FLOAT8_DTYPES)
        raise DTypeError(f"dtype must be one of torch.{names}, float8_e8m0fnu, found {dtype!r}")


def _kind(value: object) -> str:
    return dtype_name(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


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
