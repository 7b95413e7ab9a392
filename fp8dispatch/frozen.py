"""What modules over FP8 tensors share: `.to` moves them and never casts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class FrozenTensors(nn.Module):
    """A module some of whose parameters keep their dtype whatever ``.to(dtype)`` asks for.

    Attributes:
        frozen: names of these parameters; those that are None are passed over.
    """

    frozen: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Let ``.to`` and its kin move the FP8 tensors, but not cast them: the codes and scales
        belong together, and a weight cast to bf16 would be its codes, not its values."""
        held = {id(getattr(self, name)) for name in self.frozen}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if id(tensor) not in held or moved.dtype == tensor.dtype:
                return moved
            return tensor.detach().to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self
