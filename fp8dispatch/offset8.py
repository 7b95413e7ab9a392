"""A uint8 codec around a shifted zero, with its scales and its GEMM. Its bytes are not FP8.

    q = round(clamp(x * scale, -448, 448) / 448 * 127) + 128        1 <= q <= 255, zero is 128
    x = (q - 128) / 127 * 448 / scale

It is linear: 254 equal steps from -448 to 448 before scaling, rounded to nearest even. The codec
is often called FP8, and borrows E4M3's limit of 448, but its bytes and E4M3's mean different
numbers. float8 tensors are therefore refused here, and `fp8dispatch.quantize` makes real FP8.

Its scale is the reciprocal of ours: it multiplies when quantising (``448 / amax``) and divides when
restoring. The convention stays inside this module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8dispatch.checks import check_dense, check_size, names_of
from fp8dispatch.errors import (
    DeviceError,
    DTypeError,
    InvalidInputError,
    NumericalOverflowError,
    ScaleValueError,
    ShapeError,
)
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, dtype_name

FP8_MAX = 448.0
ZERO_CODE = 128
_STEPS = 127


class FP8Format:
    """Limits of E4M3, and scales that map a tensor onto them: ``scale = 448 / amax``.

    The scale multiplies when quantising: the reciprocal of the multipliers that `fp8_linear` takes.

    Attributes:
        max_value: largest finite value.
        min_normal: smallest normal value.
        exponent_bits, mantissa_bits: widths of the fields.
    """

    max_value: float = FP8_MAX
    min_normal: float = 2.0**-6
    exponent_bits: int = 4
    mantissa_bits: int = 3

    @staticmethod
    def compute_scale(tensor: torch.Tensor) -> torch.Tensor:
        """``448 / amax`` of a whole tensor, and 1 where all of it is zero.

        Args:
            tensor: any shape, bfloat16, float16 or float32.

        Returns:
            One fp32 element without dimensions, on the tensor's device.

        Raises:
            DTypeError: another dtype.
            NumericalOverflowError: NaN or infinity in the tensor.
        """
        _check_floats("tensor", tensor)
        if tensor.numel() == 0:
            return torch.ones((), device=tensor.device)
        amax = tensor.detach().abs().amax().float()
        _check_finite(amax)
        scale = (FP8_MAX / amax).clamp(max=torch.finfo(torch.float32).max)
        return torch.where(amax == 0, torch.ones_like(scale), scale)

    @staticmethod
    def compute_scale_per_channel(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """``448 / amax`` over one dimension, for codecs of one's own.

        Args:
            tensor: any shape, bfloat16, float16 or float32.
            dim: the dimension that is reduced: 1 gives a weight [out, in] one scale per output.

        Returns:
            fp32, with size 1 in place of `dim`. A channel of zeros gets 448, not 1.

        Raises:
            DTypeError, ShapeError: another dtype, or no such dimension.
            NumericalOverflowError: NaN or infinity in the tensor.
        """
        _check_floats("tensor", tensor)
        if not -tensor.dim() <= dim < tensor.dim() or tensor.numel() == 0:
            raise ShapeError(
                f"tensor must have elements and a dimension {dim}, found {list(tensor.shape)}"
            )
        amax = tensor.detach().abs().amax(dim, keepdim=True).float()
        _check_finite(amax)
        amax = torch.where(amax == 0, torch.ones_like(amax), amax)
        return (FP8_MAX / amax).clamp(max=torch.finfo(torch.float32).max)

    @staticmethod
    def is_in_range(tensor: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether ``tensor * scale``, computed in fp32, stays within 448.

        Args:
            tensor: any shape, bfloat16, float16 or float32.
            scale: broadcasts against the tensor.
        """
        _check_floats("tensor", tensor)
        if tensor.numel() == 0:
            return True
        return bool((tensor.detach().float() * scale).abs().amax() <= FP8_MAX)


@dataclass(frozen=True)
class BaselineComparison:
    """How far a result lies from a baseline.

    Attributes:
        max_error: largest absolute difference.
        mean_error: mean absolute difference.
        relative_error: mean of ``|difference| / |baseline|`` where the baseline exceeds 1e-6.
    """

    max_error: float
    mean_error: float
    relative_error: float


def quantize_fp8(
    tensor: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to the offset codec with one scale.

    Args:
        tensor: any shape and strides, bfloat16, float16 or float32, on any device.
        scale: one positive fp32 element; None takes ``448 / max(abs(tensor))``, and 1 for zeros.
            Values that the scale takes beyond 448 are clamped.

    Returns:
        uint8 codes of the tensor's shape, and the scale as one fp32 element.

    Raises:
        DTypeError, ShapeError, DeviceError, ScaleValueError: arguments that do not fit.
        NumericalOverflowError: NaN or infinity in the tensor.
    """
    _check_floats("tensor", tensor)
    if scale is None:
        scale = FP8Format.compute_scale(tensor)
    else:
        _check_scale("scale", scale, tensor)
        if tensor.numel():
            _check_finite(tensor.detach().abs().amax().float())
    scaled = (tensor.detach().float() * scale).clamp(-FP8_MAX, FP8_MAX)
    codes = torch.round(scaled / FP8_MAX * _STEPS) + ZERO_CODE
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
    _check_codes("tensor", tensor)
    _check_scale("scale", scale, tensor)
    _check_output_dtype(output_dtype)
    return ((tensor.float() - ZERO_CODE) / _STEPS * FP8_MAX / scale).to(output_dtype)


def fp8_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    output_dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """``a @ b`` over offset codes, summed in fp32.

    Args:
        a: [M, K] codes, or floats to quantise on the way.
        b: [K, N] codes, or floats to quantise on the way. Not [N, K].
        a_scale, b_scale: one fp32 element each: required with codes; with floats the scale to
            quantise with, computed where it is left out.
        output_dtype: float16, bfloat16 or float32.

    Returns:
        [M, N] in `output_dtype`.

    Raises:
        DTypeError, ShapeError, DeviceError, ScaleValueError, InvalidInputError: arguments that
            do not fit. Scales per channel are refused: the codec has one per tensor.
        NumericalOverflowError: NaN or infinity in a float operand.
    """
    for name, operand in (("a", a), ("b", b)):
        check_dense(name, operand)
        if operand.dim() != 2:
            raise ShapeError(f"{name} must be a matrix, found shape {list(operand.shape)}")
    if a.shape[1] != b.shape[0]:
        raise ShapeError(
            f"a [M, K] and b [K, N] must share K, found {list(a.shape)} and {list(b.shape)}; b is "
            f"[K, N], so pass a weight [N, K] as weight.t()"
        )
    if a.device != b.device:
        raise DeviceError(f"b must be on the device of a, {a.device}, found {b.device}; move it")
    _check_output_dtype(output_dtype)
    a_codes, a_scale = _operand("a", a, a_scale)
    b_codes, b_scale = _operand("b", b, b_scale)
    # Differences to the zero code have 7 bits: exact under TF32 and bf16 products too.
    product = (a_codes.float() - ZERO_CODE) @ (b_codes.float() - ZERO_CODE)
    return (product * (FP8_MAX / _STEPS) ** 2 / a_scale / b_scale).to(output_dtype)


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
    _check_floats("tensor", tensor)
    if scale is None:
        return quantize_fp8(tensor)
    _check_scale("scale", scale, tensor)
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


def compare_to_baseline(result: torch.Tensor, baseline: torch.Tensor) -> BaselineComparison:
    """Errors of a quantised computation against the same in fp16 or better.

    Args:
        result, baseline: floating tensors of one shape.

    Raises:
        ShapeError: two shapes, or nothing to compare.
    """
    check_dense("result", result)
    check_dense("baseline", baseline)
    if result.shape != baseline.shape or result.numel() == 0:
        raise ShapeError(
            f"result and baseline must have one shape with elements, found {list(result.shape)} "
            f"and {list(baseline.shape)}"
        )
    truth = baseline.detach().double()
    error = (result.detach().double() - truth).abs()
    large = truth.abs() > 1e-6
    relative = (error[large] / truth[large].abs()).mean() if bool(large.any()) else error.sum() * 0
    return BaselineComparison(float(error.max()), float(error.mean()), float(relative))


def _operand(
    name: str, operand: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if operand.dtype in ACTIVATION_DTYPES:
        return quantize_fp8(operand, scale)
    _check_codes(name, operand)
    if scale is None:
        raise InvalidInputError(
            f"{name}_scale must be given with codes, found none; pass what quantize_fp8 returned"
        )
    _check_scale(f"{name}_scale", scale, operand)
    return operand, scale


def _check_floats(name: str, tensor: torch.Tensor) -> None:
    check_dense(name, tensor)
    if tensor.dtype not in ACTIVATION_DTYPES:
        raise DTypeError(
            f"{name} must be one of {names_of(ACTIVATION_DTYPES)}, found "
            f"{dtype_name(tensor.dtype)}; {_hint(tensor.dtype)}"
        )


def _check_codes(name: str, tensor: torch.Tensor) -> None:
    check_dense(name, tensor)
    if tensor.dtype != torch.uint8:
        raise DTypeError(
            f"{name} must hold uint8 offset codes, found {dtype_name(tensor.dtype)}; "
            f"{_hint(tensor.dtype)}"
        )


def _hint(dtype: torch.dtype) -> str:
    if dtype in FLOAT8_DTYPES:
        return "FP8 bytes are no offset codes: use fp8dispatch.dequantize and fp8_linear"
    return "make codes with quantize_fp8"


def _check_scale(name: str, scale: torch.Tensor, beside: torch.Tensor) -> None:
    check_dense(name, scale)
    if scale.dtype != torch.float32:
        raise DTypeError(f"{name} must be float32, found {dtype_name(scale.dtype)}; convert it")
    if scale.numel() != 1:
        raise ShapeError(
            f"{name} must have one element, found {list(scale.shape)}; the codec has one scale per "
            f"tensor, and fp8_linear has scales per row and per block"
        )
    if scale.device != beside.device:
        raise DeviceError(f"{name} must be on {beside.device}, found {scale.device}; move it")
    value = float(scale)
    if not 0 < value < float("inf"):
        raise ScaleValueError(
            f"{name} must be finite and positive, found {value}; compute it again"
        )


def _check_output_dtype(dtype: object) -> None:
    if dtype not in ACTIVATION_DTYPES:
        raise DTypeError(
            f"output_dtype must be one of {names_of(ACTIVATION_DTYPES)}, found {dtype!r}"
        )


def _check_finite(amax: torch.Tensor) -> None:
    if not bool(torch.isfinite(amax).all()):
        raise NumericalOverflowError(
            "the tensor must be finite, found NaN or infinity; repair it first",
            max_value=float("nan"),
        )
