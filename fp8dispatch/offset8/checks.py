"""The checks of the offset codec's arguments; each raises one sentence."""

from __future__ import annotations

import torch

from fp8dispatch.checks import check_dense, names_of
from fp8dispatch.errors import (
    DeviceError,
    DTypeError,
    NumericalOverflowError,
    ScaleValueError,
    ShapeError,
)
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, dtype_name


def check_floats(name: str, tensor: torch.Tensor) -> None:
    check_dense(name, tensor)
    if tensor.dtype not in ACTIVATION_DTYPES:
        raise DTypeError(
            f"{name} must be one of {names_of(ACTIVATION_DTYPES)}, found "
            f"{dtype_name(tensor.dtype)}; {_hint(tensor.dtype)}"
        )


def check_codes(name: str, tensor: torch.Tensor) -> None:
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


def check_scale(name: str, scale: torch.Tensor, beside: torch.Tensor) -> None:
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


def check_output_dtype(dtype: object) -> None:
    if dtype not in ACTIVATION_DTYPES:
        raise DTypeError(
            f"output_dtype must be one of {names_of(ACTIVATION_DTYPES)}, found {dtype!r}"
        )


def check_finite(amax: torch.Tensor) -> None:
    if not bool(torch.isfinite(amax).all()):
        raise NumericalOverflowError(
            "the tensor must be finite, found NaN or infinity; repair it first",
            max_value=float("nan"),
        )
