"""Experts that a checkpoint holds as one matrix each, into models that keep them stacked.

Transformers keeps the experts of a layer in one module with parameters [E, N, K]; files have one
matrix for each expert and projection. In FP8 they become `FP8Experts`, otherwise the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fp8dispatch.errors import CheckpointError
from fp8dispatch.moe.convert import activation_of, is_experts, why_left_alone
from fp8dispatch.moe.experts import DOWN, SCALE, STATIC, FP8Experts
from fp8dispatch.pack.layouts.contract import PackedModule
from fp8dispatch.pack.packed import PackedCheckpoint
from fp8dispatch.pack.scheme import Activations
from fp8dispatch.recipe import TENSOR

_EXPERT = re.compile(r"(?P<layer>.+)\.(?P<expert>\d{1,6})\.(?P<part>[a-z_]+)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}
_REMEDY = "pass model= with one linear layer for each expert"


@dataclass
class StoredExperts:
    """The matrices of one layer's experts in a checkpoint.

    Attributes:
        module: the model's, which holds them stacked.
        parts: projection -> number of the expert -> what the checkpoint has of it: a quantised
            module, or the name of a tensor.
    """

    module: Any
    parts: dict[str, dict[int, Any]] = field(default_factory=dict)


def stored_experts(model: nn.Module, names: Mapping[str, Any]) -> dict[str, StoredExperts]:
    """The layers of a model whose experts are stacked there and single in a checkpoint.

    Args:
        model: to be filled.
        names: name of a matrix as the model would call it (``"mlp.experts.3.up_proj"``) -> what
            the checkpoint has.

    Returns:
        By the name of the module that holds them stacked.
    """
    stacked = {name: module for name, module in model.named_modules() if is_experts(module)}
    found: dict[str, StoredExperts] = {}
    for name, stored in names.items():
        match = _EXPERT.fullmatch(name)
        if match is not None and match["layer"] in stacked:
            layer = match["layer"]
            experts = found.setdefault(layer, StoredExperts(stacked[layer]))
            experts.parts.setdefault(match["part"], {})[int(match["expert"])] = stored
    return found


def names_of(layer: str, experts: StoredExperts) -> set[str]:
    """The names that `stored_experts` put together."""
    return {f"{layer}.{expert}.{part}" for part, found in experts.parts.items() for expert in found}


def fp8_experts(
    packed: PackedCheckpoint,
    layer: str,
    experts: StoredExperts,
    device: torch.device,
    backend: str | None,
) -> FP8Experts:
    """The FP8 experts that take the place of a layer's.

    Gate and up are fused, each with its own grid of scales; where their scales are single numbers
    they stay apart.

    Raises:
        CheckpointError: experts that are missing, differ in how they are quantised or do not fit
            the model, or a layer that computes what `FP8Experts` does not.
    """
    folder = packed.checkpoint.folder
    reason = why_left_alone(experts.module)
    if reason is None and experts.module.has_bias:
        reason = "its experts add biases"
    if reason is not None:
        raise CheckpointError(
            f"{folder}: {layer} needs experts that FP8Experts can stand for, found that {reason}; "
            f"{_REMEDY}"
        )
    parts = ("gate_proj", "up_proj", DOWN) if experts.module.has_gate else ("up_proj", DOWN)
    matrices = {part: _complete(folder, layer, experts, part, "in FP8") for part in parts}
    every = [module for found in matrices.values() for module in found]
    schemes = {module.scheme for module in every}
    if len(schemes) > 1:
        raise CheckpointError(
            f"{folder}: {layer} needs experts that are all quantised alike, found "
            f"{' and '.join(sorted(map(str, schemes)))}; pack the model again with one recipe"
        )
    biased = [one.name for one in every if f"{one.name}.bias" in packed.checkpoint.tensors]
    if biased:
        raise CheckpointError(
            f"{folder}: {layer} needs experts without biases, found {biased[0]}.bias; {_REMEDY}"
        )
    (scheme,) = schemes
    for part, found in matrices.items():
        _check_shapes(folder, experts.module, part, found)
    static = scheme.activations is Activations.STATIC
    fused = len(parts) == 3 and scheme.recipe != TENSOR and not static
    joined = {"gate_up_proj": parts[:2], DOWN: (DOWN,)} if fused else {one: (one,) for one in parts}
    tensors = {}
    for name, sources in joined.items():
        rows = list(zip(*(matrices[source] for source in sources), strict=True))
        codes = ([packed.all_codes(one) for one in row] for row in rows)
        tensors[name] = _stacked(len(rows), codes, device)
        scales = ([_scale(packed, one) for one in row] for row in rows)
        tensors[name + SCALE] = _stacked(len(rows), scales, device)
        if static:
            values = [packed.activation_scale(one) for row in rows for one in row]
            known = [value for value in values if value is not None]
            tensors[name + STATIC] = torch.cat(known).to(device)
    return FP8Experts.from_tensors(
        tensors,
        block_size=scheme.recipe.block_size,
        activation=activation_of(experts.module),
        split_scales=True if fused else None,
        top_k=getattr(getattr(experts.module, "config", None), "num_experts_per_tok", None) or 1,
        backend=backend,
    )


def plain_experts(
    packed: PackedCheckpoint, layer: str, experts: StoredExperts
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stacked parameters of a layer whose experts are not quantised, by name, on the CPU.

    Args:
        packed: the checkpoint.
        layer: name of the module.
        experts: its tensors' names.

    Raises:
        CheckpointError: experts that are missing, or stacked in an order that is not known.
    """
    module, folder = experts.module, packed.checkpoint.folder
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() != 3:
            continue
        parts = _PARTS.get(name, (name,))
        if len(parts) > 1 and not getattr(module, "is_concatenated", False):
            raise CheckpointError(
                f"{folder}: {layer}.{name} needs gate and up one behind the other, found that they "
                f"take turns or that its class does not say; {_REMEDY}"
            )
        found = [_complete(folder, layer, experts, part, "unquantised") for part in parts]
        matrices = [
            torch.cat([packed.checkpoint.read(one) for one in row])
            for row in zip(*found, strict=True)
        ]
        whole = torch.stack(matrices)
        turned = getattr(module, "is_transposed", False)
        yield f"{layer}.{name}", whole.transpose(1, 2).contiguous() if turned else whole


def _scale(packed: PackedCheckpoint, module: PackedModule) -> torch.Tensor:
    scale = packed.stored_scale(module)
    return scale.reshape(()) if module.scheme.recipe == TENSOR else scale


def _complete(folder: Any, layer: str, experts: StoredExperts, part: str, how: str) -> list[Any]:
    """What the checkpoint has of a projection, of every expert in order."""
    count = getattr(experts.module, DOWN).shape[0]
    found = experts.parts.get(part, {})
    missing = [number for number in range(count) if number not in found]
    beyond = sorted(number for number in found if number >= count)
    if missing or beyond:
        which = f"none for {layer}.{missing[0]}.{part}" if missing else f"also expert {beyond[0]}"
        raise CheckpointError(
            f"{folder}: {layer} needs {part} of {count} experts, all of them {how}, found {which}; "
            f"pack the experts of a layer whole, or leave them out whole with --skip "
            f"'{layer}.*'"
        )
    return [found[number] for number in range(count)]


def _check_shapes(folder: Any, module: Any, part: str, found: Iterable[PackedModule]) -> None:
    shape = tuple(getattr(module, DOWN).shape[1:])
    hidden, inner = shape[::-1] if module.is_transposed else shape
    wanted = (hidden, inner) if part == DOWN else (inner, hidden)
    for one in found:
        if one.shape != wanted:
            raise CheckpointError(
                f"{folder}: {one.name}.weight must have shape {list(wanted)} for the model, found "
                f"{list(one.shape)}; pass the model that the checkpoint was made from"
            )


def _stacked(count: int, rows: Iterable[list[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """[E, ...] on the device, the tensors of a row one behind the other.

    One row is in memory at a time. They are moved as bytes, since not every operator of torch
    takes the dtypes of FP8.
    """
    out: torch.Tensor | None = None
    dtype, shape = torch.uint8, [count]
    for number, row in enumerate(rows):
        flat = torch.cat([one.contiguous().reshape(-1).view(torch.uint8) for one in row])
        if out is None:
            first = row[0]
            dtype = first.dtype
            if first.dim():
                shape = [count, sum(len(one) for one in row), *first.shape[1:]]
            out = torch.empty((count, flat.numel()), dtype=torch.uint8, device=device)
        out[number].copy_(flat)
    assert out is not None  # a layer has experts
    return out.view(dtype).reshape(shape)
