"""What torch.compile, torch.export and fake tensors see of a quantisation: one opaque operator."""

from __future__ import annotations

import torch

from fp8dispatch.checks import (
    check_activation_scale,
    check_activations,
    check_choice,
    check_size,
)
from fp8dispatch.formats import FLOAT8_DTYPES
from fp8dispatch.oplibrary import define, register, without_autocast
from fp8dispatch.prepare import activation_scale_fp32
from fp8dispatch.quantization import dynamic
from fp8dispatch.recipe import ceil_div

define(
    "quantize_activation(Tensor x, Tensor? scale, int group_size, ScalarType dtype) "
    "-> (Tensor, Tensor)"
)


def quantize(
    x: torch.Tensor, scale: torch.Tensor | None, group_size: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Record a checked call of ``QuantizedActivation.from_tensor``; its data and scale."""
    with torch.no_grad():
        data, scales = torch.ops.fp8dispatch.quantize_activation.default(
            x, scale, group_size or 0, dtype
        )
    return data, scales


def _check(
    x: torch.Tensor, scale: torch.Tensor | None, group_size: int, dtype: torch.dtype
) -> None:
    check_activations("x", x)
    check_choice("dtype", dtype, FLOAT8_DTYPES)
    check_activation_scale(scale, x, "scale")
    if group_size:  # 0 is one scale per token
        check_size("group_size", group_size)


def _compute(
    x: torch.Tensor, scale: torch.Tensor | None, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, scale, group_size, dtype)
    k = x.shape[-1]
    static = None if scale is None else activation_scale_fp32(scale)
    with without_autocast(x):
        data, scales = dynamic.quantize(x.reshape(-1, k), group_size or k, dtype, static)
    # The decoded static scale is remembered with its source, and a graph owns what it is given.
    return data.contiguous().view(x.shape), scales if static is None else scales.clone()


def _fake(
    x: torch.Tensor, scale: torch.Tensor | None, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, scale, group_size, dtype)
    k = x.shape[-1]
    grid = (ceil_div(k, group_size or k), x.numel() // k) if scale is None else (1, 1)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(grid, dtype=torch.float32).t()


register("quantize_activation", _compute, _fake)
