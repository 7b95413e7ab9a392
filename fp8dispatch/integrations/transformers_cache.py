"""A KV cache of Transformers that holds FP8 or INT8 with calibrated scales.

Transformers' own FP8 cache takes its scale from the first tokens it sees. Here each layer, or each
of its heads, has a scale from calibration, as serving engines read it from a checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fp8dispatch.checks import check_choice
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.quantization.kv_cache import KV_DTYPES, KVScales, dequantize_kv, quantize_kv


def fp8_cache(
    scales: Mapping[str, KVScales] | Sequence[KVScales],
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Any:
    """An empty cache, to be passed to a model or to ``generate`` as ``past_key_values``.

    Args:
        scales: of each layer in the model's order, as `kv_cache_scales` gives them.
        dtype: an FP8 dtype, or int8; the one that the scales were made for.

    Returns:
        A ``transformers.Cache`` whose layers keep keys and values in it and give them back in the
        dtype that they came in. Attention sees what was rounded, from the first token on.

    Raises:
        InvalidInputError: no scales.
        DTypeError: another dtype.
        ModuleNotFoundError: Transformers is not installed.
    """
    check_choice("dtype", dtype, KV_DTYPES)
    layers = list(scales.values()) if isinstance(scales, Mapping) else list(scales)
    if not layers:
        raise InvalidInputError(
            "an FP8 cache needs the scales of at least one layer, found none; take them from "
            "kv_cache_scales"
        )
    from transformers import Cache

    return Cache(layers=[_layer_class()(layer, dtype) for layer in layers])


@functools.cache
def _layer_class() -> Any:
    """The class of a layer; made on demand, since Transformers is no requirement."""
    from transformers.cache_utils import DynamicLayer

    class FP8Layer(DynamicLayer):  # type: ignore[misc, unused-ignore]
        """Keys and values [B, H, T, D] as bytes, which every operation on them moves whole."""

        keys: Any
        values: Any

        def __init__(self, scales: KVScales, dtype: torch.dtype) -> None:
            super().__init__()
            self.scales, self.kept = scales, dtype

        def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.scales = self.scales.to(self.device)
            # Bytes: not every operator of torch takes float8 tensors.
            self.keys = key_states[..., :0, :].to(torch.uint8)
            self.values = value_states[..., :0, :].to(torch.uint8)
            self.is_initialized = True

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            keys = quantize_kv(key_states, self.scales.key, self.kept)
            values = quantize_kv(value_states, self.scales.value, self.kept)
            self.keys = torch.cat([self.keys, keys.view(torch.uint8)], dim=-2)
            self.values = torch.cat([self.values, values.view(torch.uint8)], dim=-2)
            return (
                dequantize_kv(self.keys.view(self.kept), self.scales.key, self.dtype),
                dequantize_kv(self.values.view(self.kept), self.scales.value, self.dtype),
            )

    return FP8Layer
