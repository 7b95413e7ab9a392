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
from fp8dispatch.formats import activation_float8
from fp8dispatch.kernels.hopper_config import HopperConfig, choose_config
from fp8dispatch.kernels.launch import device_limits
from fp8dispatch.kernels.requirements import GLUON_TRITON, refuse_gluon
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation
from fp8dispatch.recipe import BLOCK_128, Granularity, ceil_div
from fp8dispatch.workspace import workspace

_PITCH = 4  # fp32 scales of a group start at multiples of 16 bytes


class Gluon(LibraryBackend):
    """The Gluon kernels of `fp8dispatch.kernels`, fp32 promotion every 128 of K."""

    name = "gluon"
    distribution = "triton"
    minimum_version = GLUON_TRITON[0]
    capabilities = ((9, 0),)
    verified_capabilities = ()  # not run on a GPU yet: its first run is in a child process
    out_dtypes = frozenset({"bfloat16", "float16", "float32"})
    align_k = 16
    needs_to_load = "triton.experimental.gluon to import"
    quantizes_with_kernels = True

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
        quantized = quantize_activation(
            x,
            weight.recipe.group_size(problem.k),
            activation_float8(weight.data.dtype),
            activation_scale,
            align_groups_to=_PITCH,
            use_kernels=self.quantizes_with_kernels,
        )
        return self.matmul(quantized, weight, bias, problem)

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
        if self._kernels is None:
            self.require(weight.recipe)
        kernels = self._kernels
        assert kernels is not None  # `require` has loaded them
        m, n, k = problem.m, problem.n, problem.k
        out_dtype: torch.dtype = getattr(torch, problem.out_dtype)
        data = aligned(x.data[:m])
        device = data.device
        if config is None:
            masked = kernels.is_masked(n, out_dtype)
            config = choose_config(m, n, k, masked, device_limits(device).multiprocessors)
        blockwise = weight.recipe.block_size is not None
        groups = ceil_div(k, GROUP) if blockwise else 1
        if config.kind == "decode":
            x_scale = x.scale[:m].expand(m, groups)
            if x_scale.data_ptr() % 16:
                x_scale = x_scale.clone()
        else:
            x_scale = _m_major(x.scale, m, groups, kernels)
        weight_scale = aligned(weight.scale if blockwise else weight.scale.reshape(-1))
        out = torch.empty((m, n), dtype=out_dtype, device=device)
        needed = config.workspace(m, n)
        kernels.hopper_linear(
            data,
            x_scale,
            weight.data,
            weight_scale,
            None if bias is None else aligned(bias),
            out,
            config,
            workspace(device, *needed) if needed[0] else None,
        )
        return out

    def _load(self) -> tuple[Refusal, ...]:
        self._kernels = import_module("fp8dispatch.kernels.hopper_launch")
        return ()


def _m_major(scale: torch.Tensor, m: int, groups: int, kernels: ModuleType) -> torch.Tensor:
    """Scales [M, groups] as a tensor map reads them, copied only where they lie otherwise."""
    if scale.numel() > 1 or m * groups == 1:
        scale = scale[:m]
        if kernels.scales_fit(scale):
            return scale
    laid_out = torch.empty(
        (groups, ceil_div(m, _PITCH) * _PITCH), dtype=torch.float32, device=scale.device
    ).t()[:m]
    return laid_out.copy_(scale)


BACKEND = Gluon()
