"""The computation of `fp8dispatch.backends.triton`."""

from __future__ import annotations

import torch

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.triton import Triton
from fp8dispatch.kernels.scaled_gemm import scaled_gemm
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation

PINNED_ROWS = 64
"""M whose tile serves every M of a batch-invariant call: short enough for decoding, and tall enough
for a warpgroup's instruction."""


def matmul(
    self: Triton,
    x: QuantizedActivation,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    m, n = problem.m, problem.n
    dtype: torch.dtype = getattr(torch, problem.out_dtype)
    out = torch.empty((m, n), dtype=dtype, device=x.data.device)
    block = weight.recipe.block_size
    if block is None:
        x_scale, weight_scale = x.scale.expand(m, 1), weight.scale.reshape(-1, 1).expand(n, 1)
    else:
        groups = weight.scale.shape[1]
        x_scale, weight_scale = x.scale.expand(m, groups), weight.scale
    rows = PINNED_ROWS if problem.batch_invariant else None
    scaled_gemm(x.data, x_scale, weight.data, weight_scale, bias, out, block, tile_rows=rows)
    return out
