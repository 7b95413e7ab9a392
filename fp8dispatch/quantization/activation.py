"""Activations in FP8: one scale per token, per token and group of columns, or one given scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8dispatch.checks import (
    check_activation_scale,
    check_activations,
    check_choice,
    check_dense,
    check_dtype,
    check_size,
    check_transforms,
    is_traced,
)
from fp8dispatch.errors import InvalidInputError, ShapeError
from fp8dispatch.formats import FLOAT8_DTYPES
from fp8dispatch.prepare import activation_scale_fp32
from fp8dispatch.probes.device import runs_kernels
from fp8dispatch.quantization import eager
from fp8dispatch.recipe import ceil_div


@dataclass(frozen=True)
class QuantizedActivation:
    """Activations in FP8 with their scales: ``value = data * scale``.

    Attributes:
        data: [..., K] FP8.
        scale: fp32, for M rows of K columns: [M, ceil(K / group)] with one scale per token and
            group of columns, [M, 1] with one per token, or one element for all. The leading
            shape of `data` may stand in place of M. Any strides; our quantisers write the
            scales of a group side by side over M, as GPU kernels read them.
    """

    data: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        check_dense("QuantizedActivation.data", self.data)
        check_dense("QuantizedActivation.scale", self.scale)
        check_dtype(
            "QuantizedActivation.data",
            self.data,
            FLOAT8_DTYPES,
            "make it with QuantizedActivation.from_tensor",
        )
        check_dtype(
            "QuantizedActivation.scale",
            self.scale,
            (torch.float32,),
            "convert it to float32 multipliers",
        )
        if self.data.dim() < 1 or self.data.shape[-1] == 0:
            raise ShapeError(
                f"QuantizedActivation.data must be [..., K] with at least one column, found "
                f"{list(self.data.shape)}"
            )

    @classmethod
    def from_tensor(
        cls,
        x: torch.Tensor,
        *,
        group_size: int | None = None,
        scale: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float8_e4m3fn,
    ) -> QuantizedActivation:
        """Quantise activations once, for several linears.

        Args:
            x: [..., K] bfloat16, float16 or float32.
            group_size: columns per scale, the ``block_k`` of the weights (128 for DeepSeek-V3
                style blocks); None gives one scale per token, as row and tensor recipes need.
            scale: one positive element: static quantisation with this multiplier; it has no
                groups.
            dtype: ``float8_e4m3fn``, or ``float8_e4m3fnuz`` beside FNUZ weights.

        Raises:
            DTypeError, ShapeError, DeviceError, InvalidInputError: arguments that do not fit.
            ScaleValueError: a scale that is not finite and positive.
            UnsupportedTransformError: under torch.func.vmap or forward-mode differentiation.
        """
        traced = is_traced(x, x)
        if not traced:
            check_transforms(x, scale)
        check_activations("x", x)
        check_choice("dtype", dtype, FLOAT8_DTYPES)
        if group_size is not None:
            check_size("group_size", group_size)
        if group_size is not None and scale is not None:
            raise InvalidInputError(
                f"a static scale holds for all columns and takes no groups, found both scale and "
                f"group_size={group_size}; pass one of the two"
            )
        check_activation_scale(scale, x, "scale")
        if traced:
            from fp8dispatch import ops  # which imports this module

            return ops.quantize(x, scale, group_size, dtype)
        k = x.shape[-1]
        group = group_size or k
        if x.is_meta:
            shape = (1, 1) if scale is not None else (x.numel() // k, ceil_div(k, group))
            return cls(
                torch.empty(x.shape, dtype=dtype, device="meta"),
                torch.empty(shape, dtype=torch.float32, device="meta"),
            )
        static = None if scale is None else activation_scale_fp32(scale)
        with torch.no_grad():
            flat = quantize_activation(x.reshape(-1, k), group, dtype, static)
        return cls(flat.data.view(x.shape), flat.scale)

    def matrix(self) -> QuantizedActivation:
        """The same with `data` as [M, K] and `scale` as [M, groups] or [1, 1]."""
        data = self.data.reshape(-1, self.data.shape[-1])
        scale = self.scale
        if scale.numel() == 1:
            scale = scale.reshape(1, 1)
        elif scale.dim() == 1:
            # One token's groups beside data [K], one scale for each token beside data [..., K].
            scale = scale.reshape((1, -1) if self.data.dim() == 1 else (-1, 1))
        else:
            scale = scale.reshape(-1, scale.shape[-1])
        return QuantizedActivation(data, scale)


def quantize_activation(
    x: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
    static_scale: torch.Tensor | None = None,
    *,
    pad_rows_to: int = 1,
    use_kernels: bool | None = None,
) -> QuantizedActivation:
    """Quantise [M, K] activations with the fastest quantiser of their device.

    Args:
        x: [M, K] bf16, fp16 or fp32, any strides; unchecked.
        group_size: columns per scale; K or more gives one scale per token.
        static_scale: one fp32 element instead of computed scales.
        pad_rows_to: allocate rows up to this multiple; `data` and `scale` are then returned with
            the padding rows, which hold zeros with scale 1.
        use_kernels: run the Triton kernels or plain torch; None means the kernels on a GPU that
            they run on.

    Returns:
        data [M', K]; scale [M', groups], M-major (strides (1, M')), or one element when static.
    """
    if use_kernels is None:
        use_kernels = runs_kernels(x.device)
    m, k = x.shape
    rows = ceil_div(m, pad_rows_to) * pad_rows_to
    if rows == m and not use_kernels:
        return quantize_activation_eager(x, group_size, dtype, static_scale)
    groups = max(ceil_div(k, group_size), 1)
    data = torch.empty((rows, k), dtype=dtype, device=x.device)
    if static_scale is None:
        scale = torch.empty((groups, rows), dtype=torch.float32, device=x.device).t()
    else:
        scale = static_scale.reshape(1, 1)
    used, used_scale = data, scale
    if rows > m:
        data[m:].view(torch.uint8).zero_()
        used = data[:m]
        if static_scale is None:
            scale[m:].fill_(1.0)
            used_scale = scale[:m]
    if use_kernels:
        _run_kernel(x, used, used_scale, group_size, static_scale)
    else:
        plain = quantize_activation_eager(x, group_size, dtype, static_scale)
        used.copy_(plain.data)
        used_scale.copy_(plain.scale)
    return QuantizedActivation(data, scale)


def _run_kernel(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    static_scale: torch.Tensor | None,
) -> None:
    # Imported here because it imports Triton, which is not a requirement of the package.
    from fp8dispatch.kernels import quantize_activation as kernel

    if static_scale is not None:
        kernel.quantize_static(x, data, static_scale)
    elif scale.shape[1] == 1:
        kernel.quantize_rows(x, data, scale)
    else:
        kernel.quantize_groups(x, data, scale, group_size)


def quantize_activation_eager(
    x: torch.Tensor, group_size: int, dtype: torch.dtype, static_scale: torch.Tensor | None = None
) -> QuantizedActivation:
    """The same in plain torch, without padding: what `eager` uses, and what defines the numbers."""
    if static_scale is not None:
        data = eager.quantize_static(x, static_scale, dtype)
        return QuantizedActivation(data, static_scale.reshape(1, 1))
    columns = min(group_size, max(x.shape[1], 1))
    data, scale = eager.quantize_grid(x, 1, columns, dtype)
    return QuantizedActivation(data, scale.t().contiguous().t())
