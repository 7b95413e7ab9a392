"""The computation of `fp8dispatch.moe.backends.eager`."""

from __future__ import annotations

import torch

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.eager import BACKEND as LINEAR
from fp8dispatch.formats import activation_float8
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.eager import Eager
from fp8dispatch.moe.routing import Routing, expert_rows
from fp8dispatch.problem import ExpertsProblem
from fp8dispatch.quantization.activation import quantize_activation


def experts(
    self: Eager,
    x: torch.Tensor,
    weights: ExpertWeights,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    routing: Routing,
    problem: ExpertsProblem,
) -> torch.Tensor:
    dtype = getattr(torch, problem.out_dtype)
    out = torch.zeros((routing.rows, problem.n), dtype=dtype, device=x.device)
    sorted_rows = routing.sort(use_kernels=False)
    for expert, _, source, target in expert_rows(sorted_rows, routing.inputs):
        static = None if activation_scale is None else activation_scale[expert]
        quantized = quantize_activation(
            x[source],
            weights.recipe.group_size(problem.k),
            activation_float8(weights.data.dtype),
            static,
            use_kernels=False,
        )
        weight = Weight(
            weights.data[expert], weights.scale[expert], weights.recipe, weights.scale_source
        )
        of_expert = None if bias is None else bias[expert]
        out[target] = LINEAR.matmul(quantized, weight, of_expert, problem)
    return out
