"""`load`: a packed checkpoint into a model whose linear layers are `FP8Linear`, and whose experts
are `FP8Experts` where the model keeps them stacked.

Codes and scales go to the device as they are stored; no weight is ever restored to floats on the
way. The model is built from ``config.json`` by Transformers (an optional extra), or given.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from fp8dispatch import registry
from fp8dispatch.errors import CheckpointError, DTypeError
from fp8dispatch.modules import FP8Linear
from fp8dispatch.pack.checkpoint import read_tensor
from fp8dispatch.pack.layouts.contract import PackedModule
from fp8dispatch.pack.load_experts import (
    StoredExperts,
    fp8_experts,
    names_of,
    plain_experts,
    stored_experts,
)
from fp8dispatch.pack.packed import PackedCheckpoint
from fp8dispatch.pack.policy import SUFFIX
from fp8dispatch.pack.renaming import renaming
from fp8dispatch.pack.scheme import Activations
from fp8dispatch.policy import check_backend


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    model: nn.Module | None = None,
    backend: str | None = None,
) -> nn.Module:
    """Load a packed checkpoint of any format for inference.

    Args:
        path: a packed folder, in any format that `read_contents` knows.
        device: where the tensors go, each straight from its file.
        model: the module to fill, which may be on the meta device; its linear layers, and experts
            in one parameter, are replaced where the checkpoint is FP8, and everything else is
            assigned. None builds the model that ``config.json`` names, with Transformers; no code
            from the checkpoint is run.
        backend: run this backend in every layer or raise; None chooses per call.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: a damaged checkpoint, an architecture that Transformers does not have, or
            tensors and modules that do not correspond; the message names the first ones, and a
            given model is as it was.
        UnknownBackendError: no backend of that name.

    Warns:
        UserWarning: the checkpoint quantises weights only; here activations are quantised too.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise DTypeError(
            f"load needs a torch.nn.Module as model, found {type(model).__name__}; leave it out to "
            f"build the one that config.json names"
        )
    check_backend(backend, registry.NAMES)
    packed = PackedCheckpoint.open(path)
    if model is None:
        from fp8dispatch.pack.build import build_model

        model = build_model(packed.checkpoint)
    target = torch.device(device)
    rename = renaming(packed, model)
    skippable = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    modules = {
        rename(name): module
        for name, module in packed.contents.modules.items()
        if _submodule(model, rename(name)) is not None
        or not _matches(f"{rename(name)}.weight", skippable)
    }
    experts = stored_experts(model, modules)
    stacked = {one for layer, found in experts.items() for one in names_of(layer, found)}
    layers: dict[str, nn.Module] = {
        name: _fp8_layer(packed, module, name, model, target, backend)
        for name, module in modules.items()
        if name not in stacked
    }
    for layer, found in experts.items():
        layers[layer] = fp8_experts(packed, layer, found, target, backend)
    own = {
        tensor
        for module in packed.contents.modules.values()
        for tensor in (*(stored.name for stored in module.tensors), f"{module.name}.bias")
    }
    if packed.contents.kv is not None:
        own.update(tensor.name for tensor in packed.contents.kv.tensors)
    others = {rename(name): name for name in packed.checkpoint.tensors if name not in own}
    state = _state(packed, model, others, layers, target)  # the last that can fail
    for name, layer_module in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer_module)
    model.load_state_dict(state, strict=False, assign=True)
    model.to(target)  # buffers that the model computed itself
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _warn_weight_only(packed)
    return model.eval()


def _fp8_layer(
    packed: PackedCheckpoint,
    module: PackedModule,
    name: str,
    model: nn.Module,
    device: torch.device,
    backend: str | None,
) -> FP8Linear:
    """The layer that takes the place of a linear layer of the model."""
    file = packed.checkpoint.folder / packed.checkpoint.tensor(module.tensors[0].name).file
    place = _submodule(model, name)
    n, k = module.shape
    bias = packed.checkpoint.tensors.get(f"{module.name}.bias")
    if (
        not isinstance(place, nn.Linear)
        or (place.out_features, place.in_features) != (n, k)
        or (place.bias is None) != (bias is None)
    ):
        wanted = f"Linear({k}, {n}, bias={bias is not None})"
        found = place if isinstance(place, nn.Linear) else type(place).__name__
        raise CheckpointError(
            f"{file}: {module.name}.weight needs a layer {wanted} at {name} in the model, found "
            f"{found}; pass the model that the checkpoint was made from"
        )
    static = packed.activation_scale(module)
    return FP8Linear.from_tensors(
        packed.all_codes(module).to(device),
        packed.stored_scale(module).to(device),
        None if bias is None else read_tensor(bias).to(device),
        block_size=module.scheme.recipe.block_size,
        activation_scale=None if static is None else static.to(device),
        backend=backend,
    )


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _state(
    packed: PackedCheckpoint,
    model: nn.Module,
    names: dict[str, str],
    layers: dict[str, nn.Module],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Every tensor of the model that is not quantised, by its name there.

    Args:
        names: name in the model -> name in the checkpoint.
        layers: the FP8 layers, which have their tensors already.

    Raises:
        CheckpointError: a tensor without a place, of another shape, or missing.
    """
    folder = packed.checkpoint.folder
    has = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in layers
    }
    plain = stored_experts(
        model, {one.removesuffix(SUFFIX): at for one, at in names.items() if one.endswith(SUFFIX)}
    )
    stacked = {f"{one}{SUFFIX}" for layer, found in plain.items() for one in names_of(layer, found)}
    buffers = {name for name, _ in model.named_buffers()}
    skippable = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    unexpected = [
        name
        for name in names
        if name not in has and name not in buffers | stacked and not _matches(name, skippable)
    ]
    if unexpected:
        raise CheckpointError(
            f"{folder}: every tensor needs a place in the model, found none for "
            f"{_some(unexpected)}; pass the model that the checkpoint was made from"
        )
    state: dict[str, torch.Tensor] = {}
    shared: dict[int, nn.Parameter] = {}  # what the model ties stays tied
    for name, stored, tensor in _values(packed, names, plain):
        if name not in has:
            continue  # a buffer that the model computes itself, or that it says to skip
        if tensor.shape != has[name].shape:
            raise CheckpointError(
                f"{folder}: {stored} must have shape {list(has[name].shape)} for the model, found "
                f"{list(tensor.shape)}; pass the model that the checkpoint was made from"
            )
        state[name] = tensor.to(device)
        if isinstance(has[name], nn.Parameter):
            state[name] = shared[id(has[name])] = nn.Parameter(state[name], requires_grad=False)
    for name, tensor in has.items():
        if name not in state and id(tensor) in shared:
            state[name] = shared[id(tensor)]
    missable = _patterns(model, "_keys_to_ignore_on_load_missing")
    missing = [
        name
        for name, tensor in has.items()
        if name not in state and (tensor.is_meta or not _matches(name, missable))
    ]
    if missing:
        raise CheckpointError(
            f"{folder}: every tensor of the model must be in the checkpoint, found none for "
            f"{_some(missing)}; take the complete checkpoint"
        )
    return state


def _values(
    packed: PackedCheckpoint, names: Mapping[str, str], plain: Mapping[str, StoredExperts]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """What is not quantised: its name in the model, that in the file, and its values."""
    single = {f"{one}{SUFFIX}" for layer, found in plain.items() for one in names_of(layer, found)}
    for name, stored in names.items():
        if name not in single:
            yield name, stored, packed.checkpoint.read(stored)
    for layer, found in plain.items():
        for name, tensor in plain_experts(packed, layer, found):
            yield name, name, tensor


def _patterns(model: nn.Module, attribute: str) -> list[str]:
    found = getattr(model, attribute, None)
    if not isinstance(found, (list, tuple, set)):
        return []
    return [pattern for pattern in found if isinstance(pattern, str)]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _warn_weight_only(packed: PackedCheckpoint) -> None:
    count = sum(
        module.scheme.activations is Activations.NONE for module in packed.contents.modules.values()
    )
    if count:
        warnings.warn(
            f"{packed.checkpoint.folder} quantises the weights of {count} layers only; FP8Linear "
            f"quantises their inputs too, per token or group",
            UserWarning,
            stacklevel=3,
        )
