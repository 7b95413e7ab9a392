"""The computation of `fp8dispatch.backends.gluon`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fp8dispatch.backends.compute.operands import aligned
from fp8dispatch.backends.compute.settled import Ready, Settled
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.gluon import Gluon
from fp8dispatch.kernels.hopper_config import HopperConfig
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation
from fp8dispatch.recipe import ceil_div
from fp8dispatch.workspace import Workspace, quantized_activations, workspace

_OUT_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_PITCH = 4  # fp32 scales of a group start at multiples of 16 bytes


class _Operands(NamedTuple):
    """A plan, and what its `run` takes, in that order."""

    plan: Any
    data: torch.Tensor
    x_scale: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor
    workspace: Workspace | None


def linear(
    self: Gluon,
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    if activation_scale is not None:
        given = quantize_activation(x, problem.k, torch.float8_e4m3fn, activation_scale)
        return multiply(self, given, weight, bias, problem)
    kernels = _ready(self, weight)
    groups = weight.scale.shape[1] if weight.recipe.block_size is not None else 1
    data, scale = quantized_activations(x.device, problem.m, problem.k, groups)
    # Whatever allocates or copies comes first: nothing may stand between the two launches.
    operands = _operands(self, data, scale, weight, bias, problem, None)
    plan = operands.plan
    group = weight.recipe.group_size(problem.k)
    kernels.quantize(x, data, scale, group, dependents=plan.programmatic)
    plan.run(*operands[1:], behind_quantizer=plan.programmatic and kernels.may_overlap())
    return operands.out


def settled(
    self: Gluon,
    weight: Weight,
    activation_scale: torch.Tensor | None,
    problem: LinearProblem,
    device: torch.device,
) -> Settled | None:
    make = functools.partial(_make_ready, self, problem)
    return Settled(self, weight, activation_scale, problem, device, make)


def _make_ready(
    self: Gluon,
    problem: LinearProblem,
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
) -> Ready | None:
    """The launches of a call that `linear` has just made, on the same stream."""
    kernels = _ready(self, weight)
    groups = weight.scale.shape[1] if weight.recipe.block_size is not None else 1
    data, scale = quantized_activations(x.device, problem.m, problem.k, groups)
    static = activation_scale is not None
    if activation_scale is not None:
        scale = activation_scale.reshape(1, 1)
    operands = _operands(self, data, scale, weight, bias, problem, None)
    copied = operands.bias is not bias
    if copied or operands.weight_scale.data_ptr() != weight.scale.data_ptr():
        return None  # a copy is one call's alone
    plan = operands.plan
    overlaps = plan.programmatic and not static
    quantize = kernels.repeat_quantize(
        x,
        data,
        activation_scale if static else scale,
        weight.recipe.group_size(problem.k),
        static=static,
        dependents=overlaps,
    )
    multiply = plan.repeat(*operands[1:], behind_quantizer=overlaps)
    if quantize is None or multiply is None:
        return None
    return Ready(quantize, multiply, (data, operands.x_scale, operands.workspace, activation_scale))


def matmul(
    self: Gluon,
    x: QuantizedActivation,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    return multiply(self, x, weight, bias, problem)


def multiply(
    self: Gluon,
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
    operands = _operands(self, x.data, x.scale, weight, bias, problem, config)
    operands.plan.run(*operands[1:])
    return operands.out


def _ready(self: Gluon, weight: Weight) -> ModuleType:
    if self._kernels is None:
        self.require(weight.recipe)
    kernels = self._kernels
    assert kernels is not None  # `require` has loaded them
    return kernels


def _operands(
    self: Gluon,
    data: torch.Tensor,
    x_scale: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
    config: HopperConfig | None,
) -> _Operands:
    """The plan of a call, and its tensors as the kernels take them."""
    kernels = _ready(self, weight)
    m = problem.m
    data = _packed(data if data.shape[0] == m else data[:m])
    blockwise = weight.recipe.block_size is not None
    weight_scale = _packed(weight.scale if blockwise else weight.scale.view(-1))
    bias = None if bias is None else _packed(bias)
    out_dtype = _OUT_DTYPES[problem.out_dtype]
    plan = kernels.plan_for(
        m, weight.data, weight_scale, bias, out_dtype, weight.recipe.block_size, config
    )
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
    return _Operands(plan, data, x_scale, weight.data, weight_scale, bias, out, needed)


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
