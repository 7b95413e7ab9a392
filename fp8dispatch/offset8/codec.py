"""Numbers into offset codes and back."""

from __future__ import annotations

import torch

from fp8dispatch.checks import check_size
from fp8dispatch.errors import NumericalOverflowError
from fp8dispatch.formats import NonFinite, check_nonfinite
from fp8dispatch.offset8.checks import (
    check_codes,
    check_finite,
    check_floats,
    check_output_dtype,
    check_scale,
)
from fp8dispatch.offset8.format import FP8_MAX, FP8Format, divided

ZERO_CODE = 128
STEPS = 127


def quantize_fp8(
    tensor: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    nonfinite: NonFinite = "raise",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to the offset codec with one scale.

    Args:
        tensor: any shape and strides, bfloat16, float16 or float32, on any device.
        scale: one positive fp32 element; None takes ``448 / max(abs(tensor))``, and 1 for zeros.
            Values that the scale takes beyond 448 are clamped.
        nonfinite: ``"raise"``, or ``"saturate"``: infinities become codes 1 and 255, and a
            computed scale comes from the finite values. NaN has no code and always raises.

    Returns:
        uint8 codes of the tensor's shape, and the scale as one fp32 element.

    Raises:
        DTypeError, ShapeError, DeviceError, ScaleValueError: arguments that do not fit.
        NumericalOverflowError: NaN, or infinity unless it saturates, in the tensor.
    """
    check_floats("tensor", tensor)
    check_nonfinite(nonfinite)
    wide = tensor.detach().float()
    infinite = wide.isinf() if nonfinite == "saturate" else None
    finite = wide if infinite is None else wide.masked_fill(infinite, 0.0)
    if scale is None:
        scale = FP8Format.compute_scale(finite)
    else:
        check_scale("scale", scale, tensor)
        if tensor.numel():
            check_finite(finite.abs().amax())
    scaled = (wide * scale).clamp(-FP8_MAX, FP8_MAX)
    codes = torch.round(divided(scaled, FP8_MAX) * STEPS) + ZERO_CODE
    return codes.to(torch.uint8), scale


def dequantize_fp8(
    tensor: torch.Tensor, scale: torch.Tensor, output_dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """The values of offset codes, computed in fp32 and rounded once.

    Args:
        tensor: uint8 codes, any shape.
        scale: the fp32 element that they were quantised with.
        output_dtype: float16, bfloat16 or float32.

    Raises:
        DTypeError, ShapeError, DeviceError, ScaleValueError: arguments that do not fit.
    """
    check_codes("tensor", tensor)
    check_scale("scale", scale, tensor)
    check_output_dtype(output_dtype)
    return (divided(tensor.float() - ZERO_CODE, STEPS) * FP8_MAX / scale).to(output_dtype)


def quantize_fp8_with_overflow_handling(
    tensor: torch.Tensor, scale: torch.Tensor | None = None, max_attempts: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_fp8` that halves the scale, up to `max_attempts` times, until nothing is clamped.

    Args:
        tensor, scale: as in `quantize_fp8`.
        max_attempts: how often the scale may be halved.

    Returns:
        The codes, and the scale that was used.

    Raises:
        NumericalOverflowError: the tensor does not fit after the last halving; it carries
            `max_value` (the amax), `scale` and `attempts`.
        The errors of `quantize_fp8`.
    """
    check_size("max_attempts", max_attempts)
    check_floats("tensor", tensor)
    if scale is None:
        return quantize_fp8(tensor)
    check_scale("scale", scale, tensor)
    for _ in range(max_attempts):
        if FP8Format.is_in_range(tensor, scale):
            return quantize_fp8(tensor, scale)
        scale = scale * 0.5
    if FP8Format.is_in_range(tensor, scale):
        return quantize_fp8(tensor, scale)
    amax = float(tensor.detach().abs().amax())
    raise NumericalOverflowError(
        f"the tensor must fit 448 after scaling, found amax {amax:.4g} with scale "
        f"{float(scale):.4g} after {max_attempts} halvings; leave scale out to have it computed",
        max_value=amax,
        scale=float(scale),
        attempts=max_attempts,
    )
