"""The computation of `fp8dispatch.backends.eager`."""

from __future__ import annotations

import torch

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.eager import Eager
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation

# Elements of the weight that are widened to fp32 at a time when no block sets the step.
_STRIP_ELEMENTS = 1 << 22


def matmul(
    self: Eager,
    x: QuantizedActivation,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    block = weight.recipe.block_size
    n, k = weight.data.shape
    total = torch.zeros((x.data.shape[0], n), dtype=torch.float32, device=x.data.device)
    step = block[1] if block is not None else max(128, _STRIP_ELEMENTS // n)
    for group, start in enumerate(range(0, k, step)):
        columns = slice(start, start + step)
        part = x.data[:, columns].float() @ weight.data[:, columns].float().t()
        if block is not None:
            column = group if x.scale.shape[1] > 1 else 0
            part *= x.scale[:, column : column + 1]
            part *= weight.scale[:, group].repeat_interleave(block[0])[:n]
        total += part
    if block is None:
        total *= x.scale
        total *= weight.scale.reshape(1, -1)
    if bias is not None:
        total += bias
    return total.to(getattr(torch, problem.out_dtype))
