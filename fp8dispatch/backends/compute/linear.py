"""A linear over raw activations for every backend that does not fuse their quantisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8dispatch.backends.contract import Backend, Weight
from fp8dispatch.formats import activation_float8
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import quantize_activation

if TYPE_CHECKING:
    import torch


def linear(
    self: Backend,
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    """Quantise the activations, multiply, add the bias; arguments as in the contract."""
    quantized = quantize_activation(
        x,
        weight.recipe.group_size(problem.k),
        activation_float8(weight.data.dtype),
        activation_scale,
        pad_rows_to=self.row_multiple(problem),
        use_kernels=self.quantizes_with_kernels,
        rows_per_scale=self.rows_per_scale,
    )
    return self.matmul(quantized, weight, bias, problem)
