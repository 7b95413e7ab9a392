"""What the tensors of a checkpoint are called in the model that they go into."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from fp8dispatch.calibrate.names import tensors_in_files
from fp8dispatch.pack.packed import PackedCheckpoint
from fp8dispatch.pack.policy import SUFFIX

if TYPE_CHECKING:
    from torch import nn


class Renaming:
    """Tensor and module names of the checkpoint as the model has them.

    A base model's prefix may be missing on one side (``bert.encoder`` in the file, ``encoder`` in
    the model, or the reverse), and Transformers calls some layers otherwise than their files do.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: frozenset[str],
        drop: str = "",
        add: str = "",
    ) -> None:
        self._model, self._wanted = model, wanted
        self._drop, self._add = drop, add

    def __call__(self, name: str) -> str:
        found = name
        if self._drop:
            found = name.removeprefix(self._drop)
        elif self._add and name not in self._wanted:
            found = self._add + name
        return found if found in self._wanted else self._others.get(name, found)

    @cached_property
    def _others(self) -> dict[str, str]:
        """Names of tensors, and of the modules of weights, in the files -> in the model."""
        found = {file: here for here, file in tensors_in_files(self._model).items()}
        weights = {
            file.removesuffix(SUFFIX): here.removesuffix(SUFFIX)
            for file, here in found.items()
            if file.endswith(SUFFIX)
        }
        return weights | found


def renaming(packed: PackedCheckpoint, model: nn.Module) -> Renaming:
    """How to call what a checkpoint holds, as a model has it."""
    wanted = frozenset(model.state_dict(keep_vars=True)) | {
        name for name, _ in model.named_modules()
    }
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    modules = list(packed.contents.modules) or list(packed.checkpoint.tensors)
    if not prefix or any(name in wanted for name in modules):
        return Renaming(model, wanted)
    dot = f"{prefix}."
    if any(name.startswith(dot) and name.removeprefix(dot) in wanted for name in modules):
        return Renaming(model, wanted, drop=dot)
    if any(dot + name in wanted for name in modules):
        return Renaming(model, wanted, add=dot)
    return Renaming(model, wanted)
