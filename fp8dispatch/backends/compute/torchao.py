"""The computation of `fp8dispatch.backends.torchao`."""

from __future__ import annotations

import torch

from fp8dispatch.backends.compute.operands import aligned, on_device
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.library import GROUP
from fp8dispatch.backends.torchao import TorchAO
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation

# What a default dtype may make of the output without losing what bf16 holds.
_WIDE_ENOUGH = (torch.bfloat16, torch.float32, torch.float64)


def matmul(
    self: TorchAO,
    x: QuantizedActivation,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    self.require(weight.recipe)
    gemm = self._gemm
    assert gemm is not None  # `require` has loaded it
    m, n, k = problem.m, problem.n, problem.k
    data = aligned(x.data[:m])
    x_scale = x.scale if x.scale.numel() == 1 else x.scale[:m]
    x_scale = x_scale.expand(m, k // GROUP).contiguous()
    with on_device(weight.data):
        out = self._warmed.run(
            (n, k, (m - 1).bit_length()),
            data.device,
            lambda: gemm(data, x_scale, weight.data, weight.scale, GROUP),
        )
    if out.dtype not in _WIDE_ENOUGH:
        raise BackendUnavailableError(
            f"torchao needs the default dtype float32 or bfloat16, in which releases before "
            f"0.15 write their output, found {out.dtype}; upgrade torchao or set the default "
            f"dtype back"
        )
    return out.to(torch.bfloat16)
