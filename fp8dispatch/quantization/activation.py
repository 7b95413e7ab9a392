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
from fp8dispatch.quantization import dynamic, op
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
            return cls(*op.quantize(x, scale, group_size, dtype))
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
    rows_per_scale: int = 1,
) -> QuantizedActivation:
    """`dynamic.quantize` of [M, K] activations, as one object."""
    return unchecked(
        *dynamic.quantize(
            x,
            group_size,
            dtype,
            static_scale,
            pad_rows_to=pad_rows_to,
            use_kernels=use_kernels,
            rows_per_scale=rows_per_scale,
        )
    )


def unchecked(data: torch.Tensor, scale: torch.Tensor) -> QuantizedActivation:
    """What our own quantisers made, in every call, without the checks that it passes anyway."""
    made = object.__new__(QuantizedActivation)
    # Not made.__dict__.update: the compiler of torch 2.11 does not follow that.
    object.__setattr__(made, "data", data)
    object.__setattr__(made, "scale", scale)
    return made
