"""The product of two matrices of offset codes."""

from __future__ import annotations

import torch

from fp8dispatch.checks import check_dense
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.offset8.checks import (
    check_codes,
    check_output_dtype,
    check_same_device,
    check_scale,
)
from fp8dispatch.offset8.codec import STEPS, ZERO_CODE, quantize_fp8
from fp8dispatch.offset8.errors import ShapeMismatchError
from fp8dispatch.offset8.format import FP8_MAX


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
            raise ShapeMismatchError(
                f"{name} must be a matrix, found shape {list(operand.shape)}",
                expected=None,
                actual=tuple(operand.shape),
                tensor_name=name,
            )
    if a.shape[1] != b.shape[0]:
        raise ShapeMismatchError(
            f"a [M, K] and b [K, N] must share K, found {list(a.shape)} and {list(b.shape)}; b is "
            f"[K, N], so pass a weight [N, K] as weight.t()",
            expected=(a.shape[1], b.shape[1]),
            actual=tuple(b.shape),
            tensor_name="b",
        )
    check_same_device("b", b, a.device)
    check_output_dtype(output_dtype)
    a_codes, a_scale = _operand("a", a, a_scale)
    b_codes, b_scale = _operand("b", b, b_scale)
    # Differences to the zero code have 7 bits: exact under TF32 and bf16 products too.
    product = (a_codes.float() - ZERO_CODE) @ (b_codes.float() - ZERO_CODE)
    return (product * (FP8_MAX / STEPS) ** 2 / a_scale / b_scale).to(output_dtype)


def _operand(
    name: str, operand: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if operand.dtype in ACTIVATION_DTYPES:
        return quantize_fp8(operand, scale)
    check_codes(name, operand)
    if scale is None:
        raise InvalidInputError(
            f"{name}_scale must be given with codes, found none; pass what quantize_fp8 returned"
        )
    check_scale(f"{name}_scale", scale, operand)
    return operand, scale
