"""The computation of `fp8dispatch.backends.deepgemm`."""

from __future__ import annotations

import torch

from fp8dispatch.backends.compute.operands import aligned, group_scales, on_device
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.deepgemm import M_ALIGN, DeepGemm
from fp8dispatch.backends.library import GROUP
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import ceil_div


def matmul(
    self: DeepGemm,
    x: QuantizedActivation,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    self.require(weight.recipe)
    gemm = self._gemm
    assert gemm is not None  # `require` has loaded it
    m, n, k = problem.m, problem.n, problem.k
    rows = ceil_div(m, M_ALIGN) * M_ALIGN
    data = aligned(x.data[:m])
    groups = ceil_div(k, GROUP)
    x_scale = group_scales(x.scale, rows, groups).as_strided((m, groups), (1, rows))
    out = torch.empty((m, n), dtype=torch.bfloat16, device=data.device)

    def call() -> torch.Tensor:
        gemm(
            (data, x_scale),
            (weight.data, weight.scale),
            out,
            disable_ue8m0_cast=True,
        )
        return out

    with on_device(weight.data):
        return self._warmed.run((m, n, k), data.device, call)
