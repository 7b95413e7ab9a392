"""What the layers of a model are called in its checkpoint's files.

Transformers renames tensors while it loads some models, and stacks the matrices of experts. Its own
way back, which `save_pretrained` takes, is followed here with tensors of one number per layer
instead of weights: where a number comes out, that is the layer's name in the files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fp8dispatch.calibrate.experts import stacked_weights
from fp8dispatch.calibrate.stats import CalibrationStats

_log = logging.getLogger("fp8dispatch")

_WEIGHT, _CACHE = ".weight", ".k_scale"


def names_in_files(model: Any, attention: Iterable[str] = ()) -> dict[str, str]:
    """Names of linear layers, experts and attention modules that files call otherwise.

    Args:
        model: a model of Transformers.
        attention: names of attention modules, whose scales of the KV cache have names too.

    Returns:
        Name in the model -> name in the files, of those that differ.
    """
    if find_spec("transformers.core_model_loading") is None:
        return {}  # before version 5 nothing was renamed
    from transformers.core_model_loading import revert_weight_conversion

    labels: list[str] = []

    def label(name: str) -> int:
        labels.append(name)
        return len(labels) - 1

    state = {
        f"{name}{_WEIGHT}": torch.tensor([[label(name)]])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name in attention:
        state[f"{name}{_CACHE}"] = torch.tensor([[label(name)]])
    for stacked in stacked_weights(model):
        rows = [list(map(label, stacked.names(index))) for index in range(len(stacked.weight))]
        state[f"{stacked.layer}.{stacked.parameter}"] = torch.tensor(rows)[:, :, None]
    try:
        reverted = revert_weight_conversion(model, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        _log.warning(
            "the layers of %s keep the names that they have in memory, since Transformers cannot "
            "say those in its files (%s: %s)",
            type(model).__name__,
            type(error).__name__,
            error,
        )
        return {}
    found = {}
    for key, numbers in reverted.items():
        name = key.removesuffix(_CACHE if key.endswith(_CACHE) else _WEIGHT)
        # Several numbers: the files hold these layers in one tensor, which has no name for each.
        if name != key and numbers.numel() == 1 and labels[int(numbers)] != name:
            found[labels[int(numbers)]] = name
    return found


def renamed(stats: CalibrationStats, names: Mapping[str, str]) -> CalibrationStats:
    """The same statistics with some layers called otherwise."""
    return stats.model_copy(
        update={
            "modules": {names.get(name, name): found for name, found in stats.modules.items()},
            "kv_cache": {names.get(name, name): found for name, found in stats.kv_cache.items()},
        }
    )
