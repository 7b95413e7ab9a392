"""Our own portable Triton kernels: every recipe, block size, format and ragged shape.

Where the GPU has no FP8 (below capability 8.9), or the format is FNUZ on NVIDIA hardware, the
kernels decode the bytes to fp16, which is exact, and multiply there.
"""

from __future__ import annotations

import torch

from fp8dispatch.backends.contract import Backend, Weight
from fp8dispatch.errors import Refusal
from fp8dispatch.formats import FLOAT8_DTYPES, dtype_name
from fp8dispatch.kernels.requirements import CAPABILITIES, MINIMUM_TRITON, refuse_machine
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation

PINNED_ROWS = 64
"""M whose tile serves every M of a batch-invariant call: short enough for decoding, and tall enough
for a warpgroup's instruction."""


class Triton(Backend):
    """Triton kernels of `fp8dispatch.kernels`, fp32 promotion every 128 of K or sooner."""

    name = "triton"
    distribution = "triton"
    minimum_version = MINIMUM_TRITON
    capabilities = CAPABILITIES
    verified_capabilities = CAPABILITIES  # compiled on the spot for the device, accesses masked
    weight_dtypes = frozenset(dtype_name(dtype) for dtype in FLOAT8_DTYPES)
    quantizes_with_kernels = True  # also in the interpreter
    batch_invariant = True

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return refuse_machine(machine)

    def matmul(
        self,
        x: QuantizedActivation,
        weight: Weight,
        bias: torch.Tensor | None,
        problem: LinearProblem,
    ) -> torch.Tensor:
        from fp8dispatch.kernels.scaled_gemm import scaled_gemm

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


BACKEND = Triton()
