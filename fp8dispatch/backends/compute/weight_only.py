"""The computation of `fp8dispatch.backends.weight_only`."""

from __future__ import annotations

import torch

from fp8dispatch.backends.compute.triton import PINNED_ROWS
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.weight_only import WeightOnly
from fp8dispatch.kernels.scaled_gemm import scaled_gemm
from fp8dispatch.problem import LinearProblem


def linear(
    self: WeightOnly,
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    m, n = problem.m, problem.n
    if x.stride(1) != 1:
        x = x.contiguous()
    dtype: torch.dtype = getattr(torch, problem.out_dtype)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    block = weight.recipe.block_size
    scale = weight.scale if block is not None else weight.scale.reshape(-1, 1).expand(n, 1)
    rows = PINNED_ROWS if problem.batch_invariant else None
    scaled_gemm(x, None, weight.data, scale, bias, out, block, tile_rows=rows)
    return out
