"""Runs one checked call without gradients: decode the scale, take the decision, compute.

Everything a call needs beside its tensors is in one frozen `LinearCall`, so that the forward, its
recomputation and the backward, which may run on other threads, all mean the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fp8dispatch import registry
from fp8dispatch.backends.contract import Weight
from fp8dispatch.decide import counters, decide, put_aside
from fp8dispatch.formats import activation_float8, dtype_name
from fp8dispatch.policy import Policy
from fp8dispatch.prepare import activation_scale_fp32, weight_scale_fp32
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import Recipe
from fp8dispatch.router import Decision


@dataclass(frozen=True)
class LinearCall:
    """What a call means beside its tensors.

    Attributes:
        recipe: what the weight scale means.
        transposed: weight and, where two-dimensional, its scale were passed as [K, N].
        scale_transposed: the scale was passed transposed.
        out_dtype: dtype of the output.
        allowed: which backends may run it.
        quantized: the activations and their scales, when they come quantised.
        gradient: it computes dX, as `LinearProblem.gradient` says.
    """

    recipe: Recipe
    transposed: bool
    scale_transposed: bool
    out_dtype: torch.dtype
    allowed: Policy
    quantized: QuantizedActivation | None = None
    gradient: bool = False


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    call: LinearCall,
) -> torch.Tensor:
    """The computation itself, on checked tensors and without gradients."""
    data, scale = oriented(weight, weight_scale, call)
    n, k = data.shape
    shape = (*x.shape[:-1], n)
    m = x.numel() // k
    if x.is_meta:
        return torch.empty(shape, dtype=call.out_dtype, device="meta")
    operand = Weight(
        data, weight_scale_fp32(scale, call.recipe, n, k), call.recipe, scale_source=scale
    )
    static = None if activation_scale is None else activation_scale_fp32(activation_scale)
    problem = describe_call(m, data, call, bias, static is not None)
    return _attempt(x, operand, bias, static, problem, call, None)


def after_failure(
    error: Exception,
    decision: Decision,
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    static: torch.Tensor | None,
    problem: LinearProblem,
    call: LinearCall,
) -> torch.Tensor:
    """The rest of `forward` after the chosen backend raised `error`: the next one's turn.

    Raises:
        Exception: `error` itself, where it is the caller's to deal with (see `put_aside`).
    """
    asked = replace(problem, tile=None)  # the tile was the failed backend's
    return _attempt(x, weight, bias, static, asked, call, (error, decision))


def _attempt(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    static: torch.Tensor | None,
    problem: LinearProblem,
    call: LinearCall,
    failure: tuple[Exception, Decision] | None,
) -> torch.Tensor:
    """Try backends until one computes, putting aside what fails."""
    shape = (*x.shape[:-1], problem.n)
    allowed, failed = call.allowed, set[str]()
    if failure is not None:
        error, decision = failure
        allowed = put_aside(error, decision, x.device, allowed)
        failed.add(decision.backend)
    while True:
        decision = decide(problem, x.device, allowed)
        if problem.m == 0:  # decided all the same: a forced backend that refuses must say so
            return torch.empty(shape, dtype=call.out_dtype, device=x.device)
        backend = registry.load(decision.backend)
        decided = decision.problem  # with what was decided beside the backend
        counters.calls += 1
        try:
            if call.quantized is not None:
                out = backend.matmul(call.quantized, weight, bias, decided)
            else:
                out = backend.linear(x.reshape(problem.m, problem.k), weight, bias, static, decided)
        except Exception as raised:
            # Any library's failure: raised where it is the caller's, else another backend's turn.
            allowed = put_aside(raised, decision, x.device, allowed)
            if decision.backend in failed:
                raise
            failed.add(decision.backend)
            continue
        return out.view(shape)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast wants on the device of `x`; None where it is off."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def oriented(
    weight: torch.Tensor, weight_scale: torch.Tensor, call: LinearCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as [N, K] and its scale to match; views, never copies."""
    return (
        weight.t() if call.transposed else weight,
        weight_scale.t() if call.scale_transposed else weight_scale,
    )


def describe_call(
    m: int,
    weight: torch.Tensor,
    call: LinearCall,
    bias: torch.Tensor | None,
    static: bool,
) -> LinearProblem:
    """The call as plain data; `weight` is oriented as [N, K]."""
    n, k = weight.shape
    if call.quantized is not None:
        static = call.quantized.scale.numel() == 1 and m > 1
    return LinearProblem(
        m,
        n,
        k,
        call.recipe,
        dtype_name(weight.dtype),
        dtype_name(activation_float8(weight.dtype)),
        dtype_name(call.out_dtype),
        bias is not None,
        static,
        weight.stride(1) == 1 and weight.stride(0) >= k,
        weight.is_contiguous(),
        weight.is_meta or (weight.data_ptr() | weight.stride(0)) % 16 == 0,
        call.allowed.accuracy,
        call.allowed.batch_invariant,
        gradient=call.gradient,
    )
