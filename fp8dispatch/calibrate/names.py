"""What the layers of a model are called in its checkpoint's files.

Transformers renames tensors while it loads some models, and stacks the matrices of experts. Its own
way back, which `save_pretrained` takes, is followed here with tensors of one number per layer
instead of weights: where a number comes out, that is the layer's name in the files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
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
    labels: list[str] = []
    state = {
        f"{name}{_WEIGHT}": _label(labels, [name])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name in attention:
        state[f"{name}{_CACHE}"] = _label(labels, [name])
    for stacked in stacked_weights(model):
        rows = [_label(labels, stacked.names(index)) for index in range(len(stacked.weight))]
        state[f"{stacked.layer}.{stacked.parameter}"] = torch.stack(rows)
    found = {}
    for key, label in _reverted(model, state).items():
        name = key.removesuffix(_CACHE if key.endswith(_CACHE) else _WEIGHT)
        if name != key and labels[label] != name:
            found[labels[label]] = name
    return found


def tensors_in_files(model: Any) -> dict[str, str]:
    """Names of tensors that files call otherwise; those of experts that are stacked, one by one.

    Args:
        model: a model of Transformers; of any other, and before version 5, nothing is known.

    Returns:
        Name in the model (of an expert ``"mlp.experts.3.up_proj.weight"``) -> name in the files.
    """
    labels: list[str] = []
    stacked = {f"{one.layer}.{one.parameter}": one for one in stacked_weights(model)}
    state = {}
    for name in model.state_dict(keep_vars=True):
        if name in stacked:
            experts = [
                [f"{part}{_WEIGHT}" for part in stacked[name].names(index)]
                for index in range(len(stacked[name].weight))
            ]
            state[name] = torch.stack([_label(labels, parts) for parts in experts])
        else:
            state[name] = _label(labels, [name])
    return {
        labels[label]: key for key, label in _reverted(model, state).items() if labels[label] != key
    }


def _label(labels: list[str], names: Sequence[str]) -> torch.Tensor:
    """Numbers [names, 1] that stand for the names, which are put into `labels`."""
    labels.extend(names)
    return torch.arange(len(labels) - len(names), len(labels))[:, None]


def _reverted(model: Any, state: dict[str, torch.Tensor]) -> dict[str, int]:
    """Name in the files -> the one number that lies there. Several numbers: the files hold these
    layers in one tensor, which has no name for each."""
    if not hasattr(model, "config") or find_spec("transformers.core_model_loading") is None:
        return {}  # before version 5 nothing was renamed
    from transformers.core_model_loading import revert_weight_conversion

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
    return {key: int(numbers) for key, numbers in reverted.items() if numbers.numel() == 1}


def renamed(stats: CalibrationStats, names: Mapping[str, str]) -> CalibrationStats:
    """The same statistics with some layers called otherwise."""
    return stats.model_copy(
        update={
            "modules": {names.get(name, name): found for name, found in stats.modules.items()},
            "kv_cache": {names.get(name, name): found for name, found in stats.kv_cache.items()},
        }
    )
