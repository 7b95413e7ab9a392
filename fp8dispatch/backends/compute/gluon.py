"""The computation of `fp8dispatch.backends.gluon`."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fp8dispatch.backends.compute.operands import aligned
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.gluon import Gluon
from fp8dispatch.backends.library import GROUP
from fp8dispatch.kernels.hopper_config import DECODE_ROWS, HopperConfig
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation
from fp8dispatch.recipe import ceil_div
from fp8dispatch.workspace import Workspace, quantized_activations, takes_turns, workspace

_OUT_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_MOST_CALLS = 8192
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


class _Call:
    """A small linear that was made before: two launches that are ready but for three addresses.

    Attributes:
        dtype: of the output.
    """

    def __init__(self, quantize: Any, multiply: Any, operands: _Operands) -> None:
        self.dtype = operands.out.dtype
        self._quantize = quantize
        self._multiply = multiply
        # Memory that the launches name. Weight and scale are the caller's, and part of the key.
        self._kept = (operands.data, operands.x_scale, operands.workspace)

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        self._quantize(x.data_ptr())
        if bias is None:
            self._multiply(out.data_ptr())
        else:
            self._multiply(out.data_ptr(), bias.data_ptr())
        return out


class _Threads(threading.local):
    """The calls that each thread has made; they name memory that is the thread's own."""

    def __init__(self) -> None:
        self.calls: dict[Hashable, _Call | None] = {}  # None: it cannot be repeated

    def keep(
        self,
        key: Hashable,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        operands: _Operands,
        kernels: ModuleType,
    ) -> None:
        """Remember a call that was just made, or that it cannot be repeated."""
        if len(self.calls) >= _MOST_CALLS:
            self.calls.clear()
        self.calls[key] = None
        same_scale = operands.weight_scale.data_ptr() == weight.scale.data_ptr()
        if same_scale and operands.bias is bias:  # else a copy, which is one call's alone
            quantize = kernels.repeat_quantize(x, operands.data, operands.x_scale, GROUP)
            multiply = operands.plan.repeat(*operands[1:])
            if quantize is not None and multiply is not None:
                self.calls[key] = _Call(quantize, multiply, operands)


_threads = _Threads()


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
    m, k, device = problem.m, problem.k, x.device
    groups = weight.scale.shape[1] if weight.recipe.block_size is not None else 1
    again = m <= DECODE_ROWS and takes_turns(m, k, groups)
    if again:
        key = _key_of(x, weight, bias, problem)
        call = _threads.calls.get(key)
        if call is not None and torch.cuda.current_device() == device.index:
            return call(x, bias, torch.empty((m, problem.n), dtype=call.dtype, device=device))
    data, scale = quantized_activations(device, m, k, groups)
    _ready(self, weight).quantize(x, data, scale, GROUP)
    operands = _operands(self, data, scale, weight, bias, problem, None)
    operands.plan.run(*operands[1:])
    if again and key not in _threads.calls:
        _threads.keep(key, x, weight, bias, operands, _ready(self, weight))
    return operands.out


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
    return _Operands(plan, data, x_scale, weight.data, weight_scale, bias, out, needed)


def _key_of(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, problem: LinearProblem
) -> Hashable:
    """All that two launches depend on beside the addresses of x, bias and output."""
    device: int = x.get_device()
    data, scale = weight.data, weight.scale
    return (
        torch._C._cuda_getCurrentRawStream(device),
        device,
        data.data_ptr(),
        scale.data_ptr(),
        data.shape,
        data.stride(),
        scale.shape,
        weight.recipe.block_size,
        problem.out_dtype,
        x.shape,
        x.stride(),
        x.dtype,
        x.data_ptr() % 16,
        None if bias is None else (bias.dtype, bias.stride(), bias.data_ptr() % 16),
    )


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
