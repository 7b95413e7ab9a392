"""Experts whose weights are stacked in one parameter [E, ...], so that no module sees their inputs.

Transformers keeps the experts of a layer that way (``experts.gate_up_proj``, ``experts.down_proj``)
and multiplies with one slice after the other. What is called here is torch's own matmul, so a
torch function mode watches those calls: the slice's place in memory tells the expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Functions whose second argument is the weight, by the name that torch gives them.
_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm"})
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class StackedWeight:
    """One parameter that holds the same projection of all experts of a layer.

    Attributes:
        layer: name of the module that holds it.
        parameter: its own name in that module.
        parts: the projections in it, ``("gate_proj", "up_proj")`` where two are in one.
        weight: [E, ...].
    """

    layer: str
    parameter: str
    parts: tuple[str, ...]
    weight: torch.Tensor

    def names(self, expert: int) -> tuple[str, ...]:
        """What the projections of one expert are called in a checkpoint."""
        return tuple(f"{self.layer}.{expert}.{part}" for part in self.parts)


def stacked_weights(model: nn.Module) -> list[StackedWeight]:
    """Every parameter of three dimensions in a module that is called experts."""
    return [
        StackedWeight(layer, name, _PARTS.get(name, (name,)), parameter)
        for layer, module in model.named_modules()
        if "expert" in layer.rpartition(".")[2]
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


class ExpertInputs(TorchFunctionMode):
    """While it is entered, `observe` gets the names of an expert's projections and their input.

    Args:
        weights: of `stacked_weights`.
        observe: called with the names and the input [..., K] before the product is computed.
    """

    def __init__(
        self,
        weights: list[StackedWeight],
        observe: Callable[[tuple[str, ...], torch.Tensor], None],
    ) -> None:
        super().__init__()
        self._observe = observe
        self._by_memory = {weight.weight.untyped_storage().data_ptr(): weight for weight in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) > 1 and getattr(func, "__name__", "") in _PRODUCTS:
            self._look(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _look(self, x: Any, weight: Any) -> None:
        if not isinstance(x, torch.Tensor) or not isinstance(weight, torch.Tensor):
            return
        with torch._C.DisableTorchFunction():
            found = self._by_memory.get(weight.untyped_storage().data_ptr())
            if found is None:
                return
            if weight.dim() == 2:
                offset = weight.storage_offset() - found.weight.storage_offset()
                self._observe(found.names(offset // found.weight.stride(0)), x)
            elif weight.dim() == 3 and x.dim() == 3:
                for expert, rows in enumerate(x):
                    # Engines that multiply all experts at once give the idle ones rows of zeros.
                    routed = rows[rows.any(-1)]
                    if routed.shape[0]:
                        self._observe(found.names(expert), routed)
