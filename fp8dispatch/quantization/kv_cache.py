"""Keys and values of attention in FP8 or INT8, with static scales per layer or per head.

``value = data * scale``, as everywhere. The scales come from calibration
(`fp8dispatch.calibrate.scales.kv_cache_scales`); keys are meant as they lie in the cache, that is
after the rotary embedding.

INT8 is symmetric: codes -127 to 127, rounded to nearest even, with ``scale = amax / 127``. Its
steps are equal, so it is the more exact of the two where values are of similar size, and loses the
small ones beside outliers. Code -128 means NaN, which INT8 does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fp8dispatch.checks import check_activations, check_choice, check_dense, check_dtype
from fp8dispatch.errors import (
    DeviceError,
    DTypeError,
    InvalidInputError,
    ScaleValueError,
    ShapeError,
)
from fp8dispatch.formats import ACTIVATION_DTYPES, AMAX_FLOOR, FLOAT8_DTYPES
from fp8dispatch.quantization.eager import quantize_static, scale_of

KV_DTYPES = (*FLOAT8_DTYPES, torch.int8)
"""Dtypes that keys and values can be kept in."""
INT8_LIMIT = 127
INT8_NAN = -128


@dataclass(frozen=True)
class KVScales:
    """The scales of one layer's cache.

    Attributes:
        key: fp32 multipliers, one element for the layer or [H] for its heads.
        value: the same for values.
    """

    key: torch.Tensor
    value: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            scale = getattr(self, name)
            check_dense(name, scale)
            check_dtype(name, scale, (torch.float32,), "convert it with .to(torch.float32)")
            if scale.dim() > 1:
                raise ShapeError(
                    f"{name} must be one element or [heads], found {list(scale.shape)}"
                )
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise ScaleValueError(
                    f"{name} must be finite and positive, found {scale.tolist()}; calibrate again"
                )

    def to(self, device: torch.device | str) -> KVScales:
        """The same scales on another device."""
        return KVScales(self.key.to(device), self.value.to(device))


class KVCacheQuantizer:
    """Keys and values of every layer into FP8 or INT8 and back.

    Args:
        scales: of each layer, by its index or by the name of its attention module.
        dtype: an FP8 dtype, or int8; the one that the scales were made for.

    Raises:
        DTypeError, InvalidInputError: arguments that do not fit.
    """

    def __init__(
        self,
        scales: Mapping[str, KVScales] | Sequence[KVScales],
        dtype: torch.dtype = torch.float8_e4m3fn,
    ) -> None:
        check_choice("dtype", dtype, KV_DTYPES)
        self.dtype = dtype
        self.scales: dict[str, KVScales] = (
            dict(scales)
            if isinstance(scales, Mapping)
            else {str(index): layer for index, layer in enumerate(scales)}
        )
        wrong = [name for name, layer in self.scales.items() if not isinstance(layer, KVScales)]
        if wrong:
            raise DTypeError(
                f"the scales of each layer must be KVScales, found "
                f"{type(self.scales[wrong[0]]).__name__} for layer {wrong[0]}; take them from "
                f"kv_cache_scales"
            )

    def quantize(
        self, layer: int | str, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's new keys and values; finite values saturate, others become NaN.

        Args:
            layer: its index or name, as given at construction.
            key, value: [..., H, T, D] bfloat16, float16 or float32.
        """
        scales = self._of(layer)
        return (
            quantize_kv(key, scales.key, self.dtype),
            quantize_kv(value, scales.value, self.dtype),
        )

    def dequantize(
        self,
        layer: int | str,
        key: torch.Tensor,
        value: torch.Tensor,
        dtype: torch.dtype = torch.bfloat16,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `quantize` made, back in `dtype`."""
        scales = self._of(layer)
        return dequantize_kv(key, scales.key, dtype), dequantize_kv(value, scales.value, dtype)

    def _of(self, layer: int | str) -> KVScales:
        found = self.scales.get(str(layer))
        if found is None:
            raise InvalidInputError(
                f"there must be scales for layer {layer!r}, found those of "
                f"{', '.join(self.scales) or 'no layer'}; calibrate it"
            )
        return found


def quantize_kv(
    states: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> torch.Tensor:
    """Keys or values [..., H, T, D] in FP8 or INT8; finite values saturate, others become NaN.

    Args:
        states: bfloat16, float16 or float32.
        scale: positive fp32 multipliers on the same device: one element, or one per head [H].
        dtype: an FP8 dtype, or int8.

    Raises:
        DTypeError, ShapeError, DeviceError: arguments that do not fit.
    """
    check_activations("states", states)
    check_choice("dtype", dtype, KV_DTYPES)
    spread = _per_head(scale, states)
    if dtype != torch.int8:
        return quantize_static(states.detach(), spread, dtype)
    wide = states.detach().float()
    codes = (wide / spread).clamp(-INT8_LIMIT, INT8_LIMIT).round()
    return torch.where(torch.isfinite(wide), codes, INT8_NAN).to(torch.int8)


def dequantize_kv(
    data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """FP8 or INT8 keys or values [..., H, T, D] times their scale, rounded once to `dtype`.

    Args:
        data: what `quantize_kv` made.
        scale: what they were quantised with.
        dtype: bfloat16, float16 or float32.

    Raises:
        DTypeError, ShapeError, DeviceError: arguments that do not fit.
    """
    check_dense("data", data)
    check_dtype("data", data, KV_DTYPES, "make it with quantize_kv")
    check_choice("dtype", dtype, ACTIVATION_DTYPES)
    values = data.float() * _per_head(scale, data)
    if data.dtype == torch.int8:
        values = torch.where(data == INT8_NAN, torch.nan, values)
    return values.to(dtype)


def kv_scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 multipliers for fp32 maxima of keys or values: ``amax`` over the largest value of the
    dtype, which is 127 for int8; 1 where the amax is 0."""
    if dtype != torch.int8:
        return scale_of(amax, dtype)
    scale = amax.clamp(min=AMAX_FLOOR) / torch.full_like(amax, INT8_LIMIT)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def _per_head(scale: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The scale in a shape that broadcasts over [..., H, T, D]."""
    check_dense("scale", scale)
    check_dtype("scale", scale, (torch.float32,), "convert it with .to(torch.float32)")
    if scale.device != states.device:
        raise DeviceError(
            f"scale must be on the device of its data, {states.device}, found {scale.device}; "
            f"move it"
        )
    if scale.numel() == 1:
        return scale.reshape(())
    if states.dim() < 3 or tuple(scale.shape) != (states.shape[-3],):
        raise ShapeError(
            f"scale must have one element or one per head of [..., heads, tokens, head size], "
            f"found {list(scale.shape)} for {list(states.shape)}"
        )
    return scale.reshape(-1, 1, 1)
