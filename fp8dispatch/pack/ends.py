"""The first and last layers of a model, by their numbers: what quantisation harms most.

Errors of the first layers pass through all the others, and those of the last reach the output
unsmoothed. Keeping a few of both is what is usually tried first when a model loses too much.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_NUMBERED = re.compile(
    r"(?P<stack>.*?(?:^|\.)(?:layers|layer|blocks|block|h))\.(?P<number>\d{1,6})\."
)


class EndLayers:
    """The first and last numbered layers of each stack of a model.

    Args:
        names: of all tensors.
        config: the model's configuration; layers from ``num_hidden_layers`` on are no part of the
            stack (multi-token prediction).
        count: how many at each end; 0 for none.
    """

    def __init__(self, names: Iterable[str], config: Mapping[str, Any] | None, count: int) -> None:
        self._count = count
        self._layers: dict[str, int] = {}
        for name in names if count else ():
            found = _NUMBERED.match(name)
            if found is not None:
                stack, number = found["stack"], int(found["number"])
                self._layers[stack] = max(self._layers.get(stack, 0), number + 1)
        text = (config or {}).get("text_config")
        sizes = text if isinstance(text, dict) else config or {}
        hidden = sizes.get("num_hidden_layers")
        if isinstance(hidden, int) and hidden > 0 and len(self._layers) == 1:
            self._layers = {stack: min(n, hidden) for stack, n in self._layers.items()}

    @property
    def stacks(self) -> dict[str, int]:
        """Name of a stack of layers -> how many it has."""
        return dict(self._layers)

    def holds(self, module: str) -> bool:
        """Whether a module belongs to one of these layers."""
        found = _NUMBERED.match(f"{module}.")
        if found is None or found["stack"] not in self._layers:
            return False
        number, layers = int(found["number"]), self._layers[found["stack"]]
        return number < self._count or layers - self._count <= number < layers
