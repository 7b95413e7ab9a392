"""Launches that are ready but for one tensor: what a call that is made again and again costs.

`fp8dispatch.kernels.direct_launch` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

View = tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]
"""A tensor, and the shape and strides that a tensor map is to give its memory."""


class Repeat:
    """A direct launch on one stream, ready but for the address of one tensor.

    The caller keeps the memory alive that the other arguments name.
    """

    __slots__ = ("_after", "_before", "_launch")

    def __init__(
        self, launch: Callable[..., None], before: Sequence[Any], after: Sequence[Any]
    ) -> None:
        self._launch = launch
        self._before = tuple(before)
        self._after = tuple(after)

    def __call__(self, tensor: torch.Tensor) -> None:
        """Launch with this tensor where the kernel reads or writes it through a pointer."""
        self._launch(*self._before, tensor.data_ptr(), *self._after)


class MappedRepeat(Repeat):
    """The same where the kernel reaches the tensor through a tensor map."""

    __slots__ = ("_encode", "_maps", "_shape", "_strides")

    def __init__(
        self,
        launch: Callable[..., None],
        before: Sequence[Any],
        after: Sequence[Any],
        view: View,
        maps: dict[Hashable, tuple[Any, ...]],
        encode: Callable[[Hashable, View], tuple[Any, ...]],
    ) -> None:
        super().__init__(launch, before, after)
        _, self._shape, self._strides = view
        self._maps = maps
        self._encode = encode

    def __call__(self, tensor: torch.Tensor) -> None:
        key = (tensor.data_ptr(), self._shape, self._strides)
        found = self._maps.get(key)
        if found is None:
            found = self._encode(key, (tensor, self._shape, self._strides))
        self._launch(*self._before, *found, *self._after)
