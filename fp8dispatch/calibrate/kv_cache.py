"""The magnitudes of keys and values, read from the cache that a model returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fp8dispatch.calibrate.stats import KVRecord


class KVObserver:
    """The largest key and value of each head of each layer.

    Keys are seen as they lie in the cache, after the rotary embedding: what an FP8 cache holds.

    Args:
        model: gives the layers' names: those of the attention modules with a ``layer_idx``. Of an
            encoder with a decoder the decoder's count, as it alone has a cache.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = _attention_names(model)
        self._amax: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(self, cache: Any, mask: torch.Tensor | None = None) -> None:
        """Count a cache: one of Transformers, or a pair (key, value) for each layer.

        Args:
            cache: keys and values are [B, H, T, D]; layers without them are left out.
            mask: bool [B, T'], false where a token is padding; its last T columns count.
        """
        for index, key, value in _layers(cache):
            found = tuple(_amax_by_head(states, mask) for states in (key, value))
            name = self._names.get(index, f"layers.{index}")
            seen = self._amax.get(name)
            if seen is not None:
                found = tuple(torch.maximum(*pair) for pair in zip(seen, found, strict=True))
            self._amax[name] = (found[0], found[1])

    def records(self) -> dict[str, KVRecord]:
        """What was seen, by the attention modules' names."""
        return {
            name: KVRecord(key_amax=key.tolist(), value_amax=value.tolist())
            for name, (key, value) in self._amax.items()
        }


def _attention_names(model: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for name, module in model.named_modules():
        if two and "decoder" not in name.split("."):
            continue
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "attn" in name.lower().replace("attention", "attn"):
            names.setdefault(index, name)
    return names


def _layers(cache: Any) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder and a decoder
    for index, layer in enumerate(getattr(cache, "layers", cache)):
        if isinstance(layer, (tuple, list)):
            key, value = layer[0], layer[1]
        else:
            key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor) and key.dim() == 4:
            yield index, key, value


def _amax_by_head(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    magnitude = states.detach().float().abs()
    magnitude = torch.where(magnitude.isfinite(), magnitude, 0)
    tokens = magnitude.shape[2]
    if mask is not None and mask.shape[1] >= tokens:
        magnitude = magnitude * mask[:, None, -tokens:, None]
    return magnitude.amax(dim=(0, 2, 3)).cpu()
