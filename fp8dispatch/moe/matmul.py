"""`fp8_experts_batched` and `fp8_experts_grouped`: rows times the FP8 weights of their experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fp8dispatch import policy, registry
from fp8dispatch.checks import check_out_dtype, check_transforms, is_traced
from fp8dispatch.decide import decide
from fp8dispatch.execute import autocast_dtype
from fp8dispatch.moe import autograd, gradient, ops
from fp8dispatch.moe import dgrad as fp8_dgrad
from fp8dispatch.moe.execute import ExpertsCall, describe_call, route_of
from fp8dispatch.moe.routing import Routing, check_values
from fp8dispatch.moe.validate import check_call, check_flag
from fp8dispatch.problem import Dgrad
from fp8dispatch.router import Decision


def fp8_experts_batched(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: Sequence[int] | None = None,
    activation_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    gather: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Each row times the FP8 weight of its expert: ``x[t] @ dequantised(weight[ids[t]]).T``.

    Rows come in any order; those of one expert read its weights together. Nothing waits for the
    device.

    Args:
        x: [S, K], or [T, K] with `gather`; bfloat16, float16 or float32, any strides.
        weight: [E, N, K] FP8, any strides.
        weight_scale: multipliers, ``value = data * scale``: [E] (per tensor), [E, N] (per row),
            [E, ceil(N / bn), ceil(K / bk)] (blocks) or [E, N, ceil(K / g)] (groups).
        expert_ids: [S] of any integer dtype and stride. An id below 0 or from E on (a row of
            another rank, or padding) gives a row of zeros.
        bias: [E, N], added once.
        block_size: (bn, bk) of a block scale; states what else is inferred as in `fp8_linear`.
        activation_scale: one positive element, or one for each expert: static activations.
        out_dtype: bfloat16, float16 or float32; default is autocast's dtype under autocast, else
            the dtype of x.
        gather: [S] integers, row of x of each row: a token that several experts use need not be
            repeated. Out of range gives a row of zeros.
        backend: run this backend or raise; None takes the first that fits (`explain_experts`).

    Returns:
        [S, N] in `out_dtype`; S = 0 is fine. Gradients reach `x` (through the dequantised weights,
        summed over the uses of a row) and `bias`; the weight and the scales are frozen.

    Raises:
        InvalidInputError: arguments that do not fit (ShapeError, AmbiguousRecipeError, DTypeError,
            DeviceError, ScaleValueError).
        UnknownBackendError, ConfigurationError: a backend name or variable that cannot be read.
        BackendUnavailableError: every allowed backend refused; the message holds each reason.
        FrozenWeightError: in backward, when the weight or a scale requires grad.
        UnsupportedTransformError: under torch.func.vmap or forward-mode differentiation.
    """
    tensors = (x, weight, weight_scale, expert_ids, bias, activation_scale, gather, None)
    return _run(tensors, block_size, out_dtype, backend, batched=True, debug=False)


def fp8_experts_grouped(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: Sequence[int] | None = None,
    activation_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    gather: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
    backend: str | None = None,
    debug: bool = False,
) -> torch.Tensor:
    """Rows sorted by expert, each times the FP8 weight of its expert.

    Sorted row s takes row ``gather[s]`` of x and goes to row ``scatter[s]`` of the output, so that
    no sorted copy of the activations is needed. Nothing waits for the device, and what the call
    launches depends on shapes alone.

    Args:
        x: [S, K], or [T, K] with `gather`; bfloat16, float16 or float32, any strides.
        weight, weight_scale, bias, block_size, activation_scale, out_dtype, backend: as in
            `fp8_experts_batched`.
        offsets: [E] integers, the inclusive cumulative ends of the experts' rows:
            ``torch.cumsum(rows_per_expert, 0)``. Values are clamped to rise within 0 and S; rows
            behind the last end belong to no expert and give rows of zeros.
        gather: [S] integers, row of x of each sorted row. Out of range gives a row of zeros.
        scatter: [S] integers, row of the output of each sorted row, each at most once. Out of
            range is not written; rows that nothing is written to are zero.
        debug: read the values, which waits for the device, and raise on those that are clamped.

    Returns:
        [S, N] in `out_dtype`. Gradients as in `fp8_experts_batched`.

    Raises:
        The errors of `fp8_experts_batched`; InvalidInputError with `debug` also for values.
    """
    check_flag("debug", debug)
    tensors = (x, weight, weight_scale, offsets, bias, activation_scale, gather, scatter)
    return _run(tensors, block_size, out_dtype, backend, batched=False, debug=debug)


def explain_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    batched: bool,
    rows: int | None = None,
    block_size: Sequence[int] | None = None,
    activation_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    gathers: bool = False,
    scatters: bool = False,
    backend: str | None = None,
    dgrad: bool | None = None,
) -> Decision:
    """Which backend an expert matmul would run, and why not the others.

    Nothing of the call is computed; a backend that is about to be chosen and was never tested here
    runs its canary first.

    Args:
        x, weight, weight_scale, bias, block_size, activation_scale, out_dtype, backend: as in
            `fp8_experts_batched`.
        batched: explain `fp8_experts_batched`, else `fp8_experts_grouped`.
        rows: rows of the output, default those of x.
        gathers, scatters: the call has `gather`, `scatter`.
        dgrad: also say how dX is computed, as in `explain`.

    Raises:
        The errors of the calls.
    """
    check_flag("batched", batched)
    count = x.shape[0] if rows is None else rows

    def index(length: int) -> torch.Tensor:
        return torch.empty(length, dtype=torch.int32, device=weight.device)

    tensors = (
        x, weight, weight_scale, index(count if batched else weight.shape[0]), bias,
        activation_scale, index(count) if gathers or rows is not None else None,
        index(count) if scatters else None,
    )  # fmt: skip
    operands = check_call(*tensors, block_size=block_size, batched=batched)
    check_out_dtype(out_dtype)
    resolved = out_dtype or autocast_dtype(x) or x.dtype
    allowed = policy.resolve(backend, registry.NAMES)
    call = ExpertsCall(operands.recipe, resolved, allowed, batched)
    routing = Routing(
        weight.shape[0],
        count,
        x.shape[0],
        gather=index(count) if gathers else None,
        scatter=index(count) if scatters else None,
    )
    problem = describe_call(routing, weight, call, bias, activation_scale)
    decision = decide(problem, x.device, call.allowed)
    if not (torch.is_grad_enabled() and x.requires_grad if dgrad is None else dgrad):
        return decision
    if allowed.dgrad is Dgrad.DEQUANTIZED:
        return replace(decision, gradient=gradient.sentence(x.device, resolved))
    if not batched:
        routing = replace(routing, offsets=index(weight.shape[0]))
    else:
        routing = replace(routing, expert_ids=index(count))
    product = fp8_dgrad.explain(routing, weight, call.recipe, x.dtype, allowed)
    return replace(decision, gradient=f"as an FP8 GEMM, by {product.backend}", dgrad=product)


def _run(
    tensors: tuple[Any, ...],
    block_size: object,
    out_dtype: torch.dtype | None,
    backend: str | None,
    *,
    batched: bool,
    debug: bool,
) -> torch.Tensor:
    """Check a call, describe it, run it; `tensors` are the `TENSORS` of `moe.autograd`."""
    x, weight, _, index, _, _, gather, scatter = tensors
    traced = is_traced(x, weight)
    if not traced:
        check_transforms(*tensors)
    operands = check_call(*tensors, block_size=block_size, batched=batched)
    check_out_dtype(out_dtype)
    autocast = autocast_dtype(x)
    resolved = out_dtype or autocast or x.dtype
    if traced:
        return ops.experts(tensors, operands, resolved, backend, batched=batched, debug=debug)
    if debug and not x.is_meta:
        check_values(route_of(x.shape[0], weight.shape[0], index, gather, scatter, batched=batched))
    allowed = policy.resolve(backend, registry.NAMES)
    call = ExpertsCall(operands.recipe, resolved, allowed, batched)
    if autocast is None:
        return autograd.apply(*tensors, call)
    # Our own casts are all stated; autocast inside would change fp32 sums to 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        return autograd.apply(*tensors, call)
