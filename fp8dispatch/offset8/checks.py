"""The checks of the offset codec's arguments; each raises one sentence."""

from __future__ import annotations

import torch

from fp8dispatch.checks import check_dense, names_of
from fp8dispatch.errors import NumericalOverflowError, ScaleValueError
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, dtype_name
from fp8dispatch.offset8.errors import DeviceError, ShapeMismatchError, UnsupportedDtypeError


def check_floats(name: str, tensor: torch.Tensor) -> None:
    check_dense(name, tensor)
    if tensor.dtype not in ACTIVATION_DTYPES:
        raise UnsupportedDtypeError(
            f"{name} must be one of {names_of(ACTIVATION_DTYPES)}, found "
            f"{dtype_name(tensor.dtype)}; {_hint(tensor.dtype)}",
            dtype=tensor.dtype,
            supported_dtypes=ACTIVATION_DTYPES,
            tensor_name=name,
        )


def check_codes(name: str, tensor: torch.Tensor) -> None:
    check_dense(name, tensor)
    if tensor.dtype != torch.uint8:
        raise UnsupportedDtypeError(
            f"{name} must hold uint8 offset codes, found {dtype_name(tensor.dtype)}; "
            f"{_hint(tensor.dtype)}",
            dtype=tensor.dtype,
            supported_dtypes=(torch.uint8,),
            tensor_name=name,
        )


def _hint(dtype: torch.dtype) -> str:
    if dtype in FLOAT8_DTYPES:
        return "FP8 bytes are no offset codes: use fp8dispatch.dequantize and fp8_linear"
    return "make codes with quantize_fp8"


def check_scale(name: str, scale: torch.Tensor, beside: torch.Tensor) -> None:
    check_dense(name, scale)
    if scale.dtype != torch.float32:
        raise UnsupportedDtypeError(
            f"{name} must be float32, found {dtype_name(scale.dtype)}; convert it",
            dtype=scale.dtype,
            supported_dtypes=(torch.float32,),
            tensor_name=name,
        )
    if scale.numel() != 1:
        raise ShapeMismatchError(
            f"{name} must have one element, found {list(scale.shape)}; the codec has one scale per "
            f"tensor, and fp8_linear has scales per row and per block",
            expected=(),
            actual=tuple(scale.shape),
            tensor_name=name,
        )
    check_same_device(name, scale, beside.device)
    value = float(scale)
    if not 0 < value < float("inf"):
        raise ScaleValueError(
            f"{name} must be finite and positive, found {value}; compute it again"
        )


def check_same_device(name: str, tensor: torch.Tensor, expected: torch.device) -> None:
    if tensor.device != expected:
        raise DeviceError(
            f"{name} must be on {expected}, found {tensor.device}; move it",
            expected_device=str(expected),
            actual_device=str(tensor.device),
            tensor_name=name,
        )


def check_output_dtype(dtype: object) -> None:
    if dtype not in ACTIVATION_DTYPES:
        raise UnsupportedDtypeError(
            f"output_dtype must be one of {names_of(ACTIVATION_DTYPES)}, found {dtype!r}",
            dtype=dtype,
            supported_dtypes=ACTIVATION_DTYPES,
            tensor_name="output",
        )


def check_finite(amax: torch.Tensor) -> None:
    if not bool(torch.isfinite(amax).all()):
        raise NumericalOverflowError(
            "the tensor must be finite, found NaN or infinity; repair it first",
            max_value=float("nan"),
        )
