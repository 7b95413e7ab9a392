"""What stands between the two matmuls of an expert: SwiGLU and its relatives, or a plain function.

| form           | computes                                                                    |
|----------------|-----------------------------------------------------------------------------|
| gated          | ``f(gate) * up`` (SwiGLU with silu, GeGLU with gelu; arXiv:2002.05202)       |
| gated, limit   | the same of ``gate`` clamped from above and ``up`` clamped on both sides     |
| gated, alpha   | ``gate * sigmoid(alpha * gate) * (up + 1)`` (gpt-oss), after the clamping    |
| not gated      | ``f(up)``                                                                   |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from fp8dispatch.errors import InvalidInputError, ShapeError


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu_squared,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": _identity,
}
"""Transformers' names of the functions; `ALIASES` holds its other names of the same."""

ALIASES = {
    "swish": "silu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_tanh": "gelu_pytorch_tanh",
    "identity": "linear",
}


@dataclass(frozen=True)
class ExpertActivation:
    """The activation of experts; calling it computes.

    Attributes:
        function: a name of `FUNCTIONS` or `ALIASES`, applied to the gate (or to all, not gated).
        limit: clamps the gate from above and the other half to ``[-limit, limit]``; positive.
        alpha: the gate becomes ``gate * sigmoid(alpha * gate)`` and the other half ``up + 1``;
            `function` must be "silu" then.
        gated: two halves come in, else one tensor.
    """

    function: str = "silu"
    limit: float | None = None
    alpha: float | None = None
    gated: bool = True

    def __post_init__(self) -> None:
        name = ALIASES.get(self.function, self.function)
        if name not in FUNCTIONS:
            raise InvalidInputError(
                f"an expert activation must be one of {', '.join([*FUNCTIONS, *ALIASES])}, found "
                f"{self.function!r}"
            )
        object.__setattr__(self, "function", name)
        if self.limit is not None and not self.limit > 0:
            raise InvalidInputError(
                f"the limit of an expert activation must be positive, found {self.limit}; leave "
                f"it out for no clamping"
            )
        if self.alpha is not None and name != "silu":
            raise InvalidInputError(
                f"an expert activation with alpha is gate * sigmoid(alpha * gate), found the "
                f"function {self.function!r} beside it; pass 'silu' or leave alpha out"
            )
        if not self.gated and (self.limit is not None or self.alpha is not None):
            raise InvalidInputError(
                f"limit and alpha belong to gated experts, found limit={self.limit} and "
                f"alpha={self.alpha} with gated=False; leave them out"
            )

    def __call__(self, first: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """[S, I] in the dtype of what comes in.

        Args:
            first: [S, 2 I] with the gate in the first I columns, the gate [S, I] where `up` is
                given, or all of it [S, I] where not gated.
            up: [S, I], the other half.
        """
        function = FUNCTIONS[self.function]
        if not self.gated:
            return function(first)
        if up is None:
            if first.shape[-1] % 2:
                raise ShapeError(
                    f"gated experts need gate and up side by side, found an odd number of "
                    f"columns: {first.shape[-1]}"
                )
            first, up = first.chunk(2, dim=-1)
        if self.limit is not None:
            first = first.clamp(max=self.limit)
            up = up.clamp(min=-self.limit, max=self.limit)
        if self.alpha is not None:
            return first * torch.sigmoid(self.alpha * first) * (up + 1)
        return function(first) * up


def parse_activation(activation: object, gated: bool) -> ExpertActivation:
    """An activation from its name or as it is.

    Raises:
        InvalidInputError: an unknown name, another kind of object, or one that is gated where
            the experts are not.
    """
    if isinstance(activation, str):
        return ExpertActivation(activation, gated=gated)
    if not isinstance(activation, ExpertActivation):
        raise InvalidInputError(
            f"activation must be a name such as 'silu' or an ExpertActivation, found {activation!r}"
        )
    if activation.gated != gated:
        raise InvalidInputError(
            f"activation.gated must be {gated} as the experts are, found {activation.gated}"
        )
    return activation
