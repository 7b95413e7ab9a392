"""The empty model that a ``config.json`` names, by Transformers, without memory for its weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.checkpoint import Checkpoint, resolve_inside
from fp8dispatch.pack.jsonfiles import read_object
from fp8dispatch.pack.unpack import plain_config

_patching = threading.Lock()


def build_model(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint's ``config.json``, its parameters on the meta device.

    Buffers, such as rotary frequencies, are computed as usual. No code from the checkpoint is run.

    Raises:
        CheckpointError: no ``config.json``, no Transformers here, or an architecture that this
            Transformers does not have.
    """
    config = plain_config(checkpoint.config)
    remedy = "pass model=, a torch.nn.Module with these layers"
    if config is None:
        raise CheckpointError(
            f"{checkpoint.folder}: building the model needs config.json, found none; {remedy}"
        )
    if find_spec("transformers") is None:
        raise CheckpointError(
            f"{checkpoint.folder}: building the model needs the package transformers, found none; "
            f"install it, or {remedy}"
        )
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    model_type = config.get("model_type")
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if (
        not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel))
        or not isinstance(model_type, str)
        or model_type not in transformers.CONFIG_MAPPING
    ):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json must name an architecture of transformers "
            f"{transformers.__version__}, found {name!r:.80} of type {model_type!r:.80}; install a "
            f"transformers that has it, or {remedy}"
        )
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    parsed = transformers.CONFIG_MAPPING[model_type].from_dict(arguments)
    with _parameters_on_meta():
        built: Any = found(parsed)
    generation = checkpoint.folder / "generation_config.json"
    if found.can_generate() and generation.exists():
        settings = read_object(resolve_inside(checkpoint.folder, generation.name))
        built.generation_config = transformers.GenerationConfig.from_dict(settings)
    model: nn.Module = built
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules that are built in the block keep their parameters without memory.

    Under ``torch.device("meta")`` the buffers would be without values too, and no checkpoint has
    those that are not persistent. A parameter's memory is given up before anything is written to
    it. One thread at a time; modules built elsewhere meanwhile would be affected.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            empty = torch.empty_like(parameter, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)

    with _patching:
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
