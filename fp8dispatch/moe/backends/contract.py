"""What every backend of expert matmuls answers and does; its answers need no torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from fp8dispatch.backends.contract import Capability
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from fp8dispatch.moe.routing import Routing


class ExpertWeights(NamedTuple):
    """The weights of all experts of one call, checked; made anew in every call.

    Attributes:
        data: [E, N, K] FP8, any strides.
        scale: fp32 multipliers, contiguous: [E, 1] per tensor, [E, N, 1] per row, [E,
            ceil(N / bn), ceil(K / bk)] per block.
        recipe: what the scale of each expert means.
        scale_source: the caller's tensor that `scale` was made from; layouts that a backend
            prepares are remembered with it.
    """

    data: torch.Tensor
    scale: torch.Tensor
    recipe: Recipe
    scale_source: torch.Tensor


class ExpertBackend(Capability):
    """A way to multiply each row by the weight of its expert."""

    @abstractmethod
    def experts(
        self,
        x: torch.Tensor,
        weights: ExpertWeights,
        bias: torch.Tensor | None,
        activation_scale: torch.Tensor | None,
        routing: Routing,
        problem: ExpertsProblem,
    ) -> torch.Tensor:
        """Quantise the activations, multiply each row by its expert's weight, add its bias.

        Args:
            x: [T, K] bf16, fp16 or fp32, any strides; there is at least one row of output.
            weights: the FP8 weights.
            bias: [E, N] of any float dtype, any strides, added exactly once.
            activation_scale: fp32 [E], one for each expert, or None for dynamic activations. All
                are one element, repeated, unless ``problem.static_per_expert``.
            routing: which row goes to which expert; its values are checked by nobody.
            problem: the same call as plain data; gives output dtype and accuracy.

        Returns:
            [rows, N] in ``problem.out_dtype``; rows of no expert, and rows that nothing is
            written to, are zero.
        """
