"""`rms_norm_quantize` and `silu_mul_quantize`: checked, for eager calls and for compilers alike.

torch.compile, torch.export and fake tensors see one opaque operator for each.
"""

from __future__ import annotations

import math
from typing import overload

import torch

from fp8dispatch.checks import (
    check_activations,
    check_choice,
    check_dense,
    check_device,
    check_dtype,
    check_size,
    check_transforms,
    is_traced,
)
from fp8dispatch.errors import DeviceError, DTypeError, InvalidInputError, ShapeError
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, dtype_name
from fp8dispatch.oplibrary import define, register, without_autocast
from fp8dispatch.quantization import fused
from fp8dispatch.quantization.activation import QuantizedActivation, unchecked
from fp8dispatch.recipe import ceil_div

_Quantized = tuple[torch.Tensor, torch.Tensor]
_QuantizedSum = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_TAIL = "int group_size, ScalarType dtype) -> "
define(f"rms_norm_quantize(Tensor x, Tensor weight, float eps, {_TAIL}(Tensor, Tensor)")
define(
    f"add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, {_TAIL}"
    f"(Tensor, Tensor, Tensor)"
)
define(f"silu_mul_quantize(Tensor gate, Tensor up, {_TAIL}(Tensor, Tensor)")
"""``group_size = 0`` means one scale per token."""


@overload
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> QuantizedActivation: ...


@overload
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[QuantizedActivation, torch.Tensor]: ...


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> QuantizedActivation | tuple[QuantizedActivation, torch.Tensor]:
    """RMSNorm whose result goes straight to FP8, for the linears that read it.

    ``h = x + residual`` is rounded to their dtype, as the model keeps it; then
    ``h * weight / sqrt(mean(h^2) + eps)`` stays in fp32 until it is quantised, where a norm apart
    would be rounded to the dtype of x first. On a GPU one kernel reads x once and writes FP8.

    Args:
        x: [..., K] bfloat16, float16 or float32; any strides.
        weight: [K] of any of these dtypes: the norm's gain.
        eps: positive; added to the mean of the squares.
        residual: shape, dtype and device of x.
        group_size: columns per scale, the ``block_k`` of the weights that follow; None gives one
            scale per token, as row and tensor recipes need.
        dtype: ``float8_e4m3fn``, or ``float8_e4m3fnuz`` beside FNUZ weights.

    Returns:
        What `fp8_linear_quantized` takes; with `residual` also the sum [..., K] in x's dtype, the
        residual of the next layer.

    Raises:
        DTypeError, ShapeError, DeviceError, InvalidInputError: arguments that do not fit, or a
            gradient that would be lost: for training there is `rms_norm_linear`.
        UnsupportedTransformError: under torch.func.vmap or forward-mode differentiation.
    """
    traced = is_traced(x, weight)
    if not traced:
        check_transforms(x, weight, residual)
    check_norm(x, weight, eps, residual)
    _check_quantizer(group_size, dtype)
    _refuse_gradients("rms_norm", x, weight, residual)
    group = group_size or 0
    total = None
    if traced and residual is None:
        data, scale = torch.ops.fp8dispatch.rms_norm_quantize.default(x, weight, eps, group, dtype)
    elif traced:
        data, scale, total = torch.ops.fp8dispatch.add_rms_norm_quantize.default(
            x, residual, weight, eps, group, dtype
        )
    else:
        data, scale, total = _norm(x, residual, weight, eps, group, dtype)
    quantized = unchecked(data, scale)
    return quantized if total is None else (quantized, total)


def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> QuantizedActivation:
    """``silu(gate) * up`` of a gated MLP, straight to FP8 for the linear that reads it.

    In fp32 from the loads to the quantiser, where the product apart would be rounded to the dtype
    of its operands first. On a GPU one kernel reads both once and writes FP8.

    Args:
        gate: [..., K] bfloat16, float16 or float32; any strides, such as half of a joint tensor.
        up: shape, dtype and device of gate.
        group_size, dtype: as in `rms_norm_quantize`.

    Returns:
        What `fp8_linear_quantized` takes.

    Raises:
        DTypeError, ShapeError, DeviceError, InvalidInputError: arguments that do not fit, or a
            gradient that would be lost: for training there is `silu_mul_linear`.
        UnsupportedTransformError: under torch.func.vmap or forward-mode differentiation.
    """
    traced = is_traced(gate, up)
    if not traced:
        check_transforms(gate, up)
    check_gate(gate, up)
    _check_quantizer(group_size, dtype)
    _refuse_gradients("silu_mul", gate, up)
    if traced:
        return unchecked(
            *torch.ops.fp8dispatch.silu_mul_quantize.default(gate, up, group_size or 0, dtype)
        )
    return unchecked(*_silu_mul(gate, up, group_size or 0, dtype))


def check_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> None:
    """The operands of an RMSNorm.

    Raises:
        DTypeError, ShapeError, DeviceError, InvalidInputError: what is wrong.
    """
    check_activations("x", x)
    check_dense("weight", weight)
    check_dtype("weight", weight, ACTIVATION_DTYPES, "convert it with weight.to(torch.float32)")
    if tuple(weight.shape) != (x.shape[-1],):
        raise ShapeError(
            f"the norm's weight must be [{x.shape[-1]}], one value per column of x, found "
            f"{list(weight.shape)}"
        )
    check_device("x", x, weight)
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise DTypeError(f"eps must be a positive number such as 1e-6, found {eps!r}")
    if not (math.isfinite(eps) and eps > 0):
        raise InvalidInputError(f"eps must be a positive number such as 1e-6, found {eps}")
    if residual is not None:
        _check_alike("residual", residual, "x", x)


def check_gate(gate: torch.Tensor, up: torch.Tensor) -> None:
    """The operands of a gated product.

    Raises:
        DTypeError, ShapeError, DeviceError: what is wrong.
    """
    check_activations("gate", gate)
    _check_alike("up", up, "gate", gate)


def _check_alike(name: str, tensor: torch.Tensor, other: str, reference: torch.Tensor) -> None:
    check_dense(name, tensor)
    if tensor.dtype != reference.dtype:
        raise DTypeError(
            f"{name} must have the dtype of {other}, {dtype_name(reference.dtype)}, found "
            f"{dtype_name(tensor.dtype)}; convert one of the two"
        )
    if tensor.shape != reference.shape:
        raise ShapeError(
            f"{name} must have the shape of {other}, {list(reference.shape)}, found "
            f"{list(tensor.shape)}"
        )
    if tensor.device != reference.device:
        raise DeviceError(
            f"{name} must be on the device of {other}, {reference.device}, found "
            f"{tensor.device}; move it with .to()"
        )


def _check_quantizer(group_size: int | None, dtype: torch.dtype) -> None:
    check_choice("dtype", dtype, FLOAT8_DTYPES)
    if group_size is not None:
        check_size("group_size", group_size)


def _refuse_gradients(operation: str, *tensors: torch.Tensor | None) -> None:
    """Quantised activations carry no gradient; losing one silently would train nothing."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    ):
        raise InvalidInputError(
            f"{operation}_quantize gives no gradient, found an input that requires one; use "
            f"{operation}_linear for training, torch.no_grad() for inference"
        )


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The computation on checked tensors of any leading shape."""
    k = x.shape[-1]
    if x.is_meta:
        return *_empty(x, group_size, dtype), None if residual is None else _plain(x)
    flat = None if residual is None else residual.reshape(-1, k)
    with torch.no_grad(), without_autocast(x):
        data, scale, total = fused.rms_norm_quantize(
            x.reshape(-1, k), flat, weight, eps, group_size or k, dtype
        )
    return data.view(x.shape), scale, None if total is None else total.view(x.shape)


def _silu_mul(
    gate: torch.Tensor, up: torch.Tensor, group_size: int, dtype: torch.dtype
) -> _Quantized:
    k = gate.shape[-1]
    if gate.is_meta:
        return _empty(gate, group_size, dtype)
    with torch.no_grad(), without_autocast(gate):
        data, scale = fused.silu_mul_quantize(
            gate.reshape(-1, k), up.reshape(-1, k), group_size or k, dtype
        )
    return data.view(gate.shape), scale


def _empty(x: torch.Tensor, group_size: int, dtype: torch.dtype) -> _Quantized:
    """Data and scales as the operations lay them out, without values."""
    k = x.shape[-1]
    grid = (ceil_div(k, group_size or k), x.numel() // k)
    return _plain(x, dtype), x.new_empty(grid, dtype=torch.float32).t()


def _plain(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _norm_op(
    x: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int, dtype: torch.dtype
) -> _Quantized:
    check_norm(x, weight, eps, None)
    _check_quantizer(group_size or None, dtype)
    data, scale, _ = _norm(x, None, weight, eps, group_size, dtype)
    return data, scale


def _norm_fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int, dtype: torch.dtype
) -> _Quantized:
    check_norm(x, weight, eps, None)
    return _empty(x, group_size, dtype)


def _add_norm_op(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
) -> _QuantizedSum:
    check_norm(x, weight, eps, residual)
    _check_quantizer(group_size or None, dtype)
    data, scale, total = _norm(x, residual, weight, eps, group_size, dtype)
    assert total is not None
    return data, scale, total.contiguous()


def _add_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
) -> _QuantizedSum:
    check_norm(x, weight, eps, residual)
    return *_empty(x, group_size, dtype), _plain(x)


def _silu_mul_op(
    gate: torch.Tensor, up: torch.Tensor, group_size: int, dtype: torch.dtype
) -> _Quantized:
    check_gate(gate, up)
    _check_quantizer(group_size or None, dtype)
    return _silu_mul(gate, up, group_size, dtype)


def _silu_mul_fake(
    gate: torch.Tensor, up: torch.Tensor, group_size: int, dtype: torch.dtype
) -> _Quantized:
    check_gate(gate, up)
    return _empty(gate, group_size, dtype)


register("rms_norm_quantize", _norm_op, _norm_fake)
register("add_rms_norm_quantize", _add_norm_op, _add_norm_fake)
register("silu_mul_quantize", _silu_mul_op, _silu_mul_fake)
