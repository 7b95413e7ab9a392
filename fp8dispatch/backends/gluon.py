"""Our own kernels for Hopper, written in Gluon, Triton's lower level: nothing else is needed.

e4m3fn weights in 128x128 blocks, per row or per tensor, with exact accumulation in every recipe;
any M and N, a fused bias of any float dtype, and bf16, fp16 or fp32 output. Bulk copies (TMA) move
the operands, so the rows of both start at multiples of 16 bytes: K is a multiple of 16.

Which kernel takes a call is `fp8dispatch.kernels.hopper_config`'s to say. The kernels and what was
measured on their prototypes are described in `fp8dispatch.kernels.hopper_gemm` and
`hopper_decode`; which Triton they are compiled for in `gluon_compat`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.library import GROUP, LibraryBackend, aligned
from fp8dispatch.errors import Refusal
from fp8dispatch.kernels.hopper_config import HopperConfig
from fp8dispatch.kernels.requirements import GLUON_TRITON, refuse_gluon
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation
from fp8dispatch.recipe import BLOCK_128, Granularity, ceil_div
from fp8dispatch.workspace import quantized_activations, workspace

_OUT_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_PITCH = 4  # fp32 scales of a group start at multiples of 16 bytes


class Gluon(LibraryBackend):
    """The Gluon kernels of `fp8dispatch.kernels`, fp32 promotion every 128 of K."""

    name = "gluon"
    distribution = "triton"
    minimum_version = GLUON_TRITON[0]
    capabilities = ((9, 0),)
    verified_capabilities = ()  # not run on a GPU yet: its first run is in a child process
    out_dtypes = frozenset(_OUT_DTYPES)
    align_k = 16
    needs_to_load = "triton.experimental.gluon to import"

    def __init__(self) -> None:
        super().__init__()
        self._kernels: ModuleType | None = None

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return refuse_gluon(machine)

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals: list[Refusal] = []
        if problem.recipe.granularity is Granularity.BLOCK and problem.recipe != BLOCK_128:
            refusals.append(Refusal("block-size", "blocks 128x128", str(problem.recipe)))
        if not problem.weight_row_major:
            refusals.append(Refusal("layout", "a row-major weight [N, K]", "other strides"))
        if not problem.aligned:
            need = "weight memory and rows aligned to 16 bytes"
            refusals.append(Refusal("alignment", need, "an odd address or row stride"))
        return refusals

    def linear(
        self,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        activation_scale: torch.Tensor | None,
        problem: LinearProblem,
    ) -> torch.Tensor:
        if activation_scale is not None:
            given = quantize_activation(x, problem.k, torch.float8_e4m3fn, activation_scale)
            return self.matmul(given, weight, bias, problem)
        if self._kernels is None:
            self.require(weight.recipe)
        kernels = self._kernels
        assert kernels is not None  # `require` has loaded them
        groups = weight.scale.shape[1] if weight.recipe.block_size is not None else 1
        data, scale = quantized_activations(x.device, problem.m, problem.k, groups)
        kernels.quantize(x, data, scale, GROUP)
        return self._product(data, scale, weight, bias, problem, None)

    def matmul(
        self,
        x: QuantizedActivation,
        weight: Weight,
        bias: torch.Tensor | None,
        problem: LinearProblem,
    ) -> torch.Tensor:
        return self.multiply(x, weight, bias, problem)

    def multiply(
        self,
        x: QuantizedActivation,
        weight: Weight,
        bias: torch.Tensor | None,
        problem: LinearProblem,
        config: HopperConfig | None = None,
    ) -> torch.Tensor:
        """`matmul` with the kernel given, to measure and to test one after the other.

        Args:
            config: the kernel; by default the choice of `choose_config`. A decode kernel takes at
                most its ``block_m`` rows; a "wide" one no N whose output rows are not multiples of
                16 bytes.
        """
        return self._product(x.data, x.scale, weight, bias, problem, config)

    def _product(
        self,
        data: torch.Tensor,
        x_scale: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        problem: LinearProblem,
        config: HopperConfig | None,
    ) -> torch.Tensor:
        if self._kernels is None:
            self.require(weight.recipe)
        kernels = self._kernels
        assert kernels is not None  # `require` has loaded them
        m = problem.m
        data = _packed(data if data.shape[0] == m else data[:m])
        blockwise = weight.recipe.block_size is not None
        weight_scale = _packed(weight.scale if blockwise else weight.scale.view(-1))
        bias = None if bias is None else _packed(bias)
        out_dtype = _OUT_DTYPES[problem.out_dtype]
        plan = kernels.plan_for(m, weight.data, weight_scale, bias, out_dtype, config)
        groups = weight_scale.shape[1] if blockwise else 1
        if plan.any_scales:
            if x_scale.shape != (m, groups):
                x_scale = x_scale[:m].expand(m, groups)
            if x_scale.data_ptr() % 16:
                x_scale = x_scale.clone()
        else:
            x_scale = _m_major(x_scale, m, groups, kernels)
        out = torch.empty((m, problem.n), dtype=out_dtype, device=data.device)
        needed = workspace(data.device, plan.elements, plan.counters) if plan.elements else None
        plan.run(data, x_scale, weight.data, weight_scale, bias, out, needed)
        return out

    def _load(self) -> tuple[Refusal, ...]:
        self._kernels = import_module("fp8dispatch.kernels.hopper_launch")
        return ()


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is contiguous and aligned, else a copy that is."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return aligned(tensor)


def _m_major(scale: torch.Tensor, m: int, groups: int, kernels: ModuleType) -> torch.Tensor:
    """Scales [M, groups] as a tensor map reads them, copied only where they lie otherwise."""
    if scale.numel() > 1 or m * groups == 1:
        scale = scale if scale.shape[0] == m else scale[:m]
        if kernels.scales_fit(scale):
            return scale
    laid_out = torch.empty(
        (groups, ceil_div(m, _PITCH) * _PITCH), dtype=torch.float32, device=scale.device
    ).t()[:m]
    return laid_out.copy_(scale)


BACKEND = Gluon()
