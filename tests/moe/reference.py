"""What routed experts should give: one expert at a time, in float64, written apart from the code.

`exact` takes the weights as they are; `quantized` also quantises what goes into each matmul as the
design says, so that only rounding to the working dtype is left as a difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tests import oracle

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8dispatch import FP8Experts
    from fp8dispatch.recipe import Recipe


@dataclass
class Experts:
    """Plain experts in float64, whose tensors take gradients.

    Attributes:
        up: [E, N, H], gate first where two halves come out.
        down: [E, H, I].
        act: [S, N] to [S, I].
        up_bias, down_bias: [E, N] and [E, H], or None.
        between: applied to what enters each matmul, with the static scale of its expert.
        up_static, down_static: [E] or None.
    """

    up: torch.Tensor
    down: torch.Tensor
    act: Callable[[torch.Tensor], torch.Tensor]
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    between: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] = field(
        default=lambda x, static: x
    )
    up_static: torch.Tensor | None = None
    down_static: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[T, H] of [T, H], ids and weights [T, k]; unknown ids add nothing."""
        experts = self.down.shape[0]
        rows = []
        for token in range(x.shape[0]):
            total = torch.zeros_like(x[token])
            for slot in range(ids.shape[1]):
                one = int(ids[token, slot])
                if not 0 <= one < experts:
                    continue
                inner = self.act(self._linear(x[token : token + 1], one, "up"))
                out = self._linear(inner, one, "down")[0]
                total = total + weights[token, slot] * out
            rows.append(total)
        return torch.stack(rows) if rows else torch.zeros_like(x)

    def _linear(self, x: torch.Tensor, one: int, side: str) -> torch.Tensor:
        static, bias = getattr(self, f"{side}_static"), getattr(self, f"{side}_bias")
        x = self.between(x, None if static is None else static[one])
        out = x @ getattr(self, side)[one].t()
        return out if bias is None else out + bias[one]


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def dequantized(module: FP8Experts, name: str, recipe: Recipe) -> torch.Tensor:
    """[E, N, K] float64 of a projection, by the oracle's own dequantiser."""
    weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
    pairs = zip(weight.detach(), scale.detach(), strict=True)
    return torch.stack([oracle.dequantized_weight(w, s, recipe) for w, s in pairs])


def of_module(
    module: FP8Experts,
    recipe: Recipe,
    act: Callable[[torch.Tensor], torch.Tensor] = silu_and_mul,
    *,
    quantize: bool,
) -> Experts:
    """The experts of a module, with or without the quantisation of activations."""

    def tensor(name: str) -> torch.Tensor | None:
        parts = [getattr(module, one + name, None) for one in module.projections[:-1]]
        return (
            torch.cat([part.detach().double() for part in parts], 1)
            if parts[0] is not None
            else None
        )

    def between(x: torch.Tensor, static: torch.Tensor | None) -> torch.Tensor:
        one = None if static is None else static.reshape(1)
        return oracle.dequantized_activations(x.float(), recipe, module.down_proj.dtype, one)

    ups = [dequantized(module, name, recipe) for name in module.projections[:-1]]
    static = getattr(module, module.projections[0] + "_activation_scale", None)
    down_bias = getattr(module, "down_proj_bias", None)
    return Experts(
        torch.cat(ups, 1),
        dequantized(module, "down_proj", recipe),
        act,
        tensor("_bias"),
        None if down_bias is None else down_bias.detach().double(),
        **({"between": between} if quantize else {}),
        up_static=static if quantize else None,
        down_static=getattr(module, "down_proj_activation_scale", None) if quantize else None,
    )


def routed(
    tokens: int, top_k: int, experts: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids without repetition inside a token, and weights that add up to 1."""
    scores = torch.randn(tokens, experts, device=device)
    values, ids = scores.topk(top_k, -1)
    return ids, values.softmax(-1)
