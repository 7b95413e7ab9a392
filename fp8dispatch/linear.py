"""`fp8_linear` and its relatives: check the arguments, describe the call, run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fp8dispatch import autograd, dequantized_grad, ops, plans, policy, registry
from fp8dispatch import dgrad as fp8_dgrad
from fp8dispatch.checks import (
    check_activation_scale,
    check_activations,
    check_bias,
    check_device,
    check_out_dtype,
    check_transforms,
    is_traced,
)
from fp8dispatch.decide import decide
from fp8dispatch.errors import DTypeError, FrozenWeightError
from fp8dispatch.execute import LinearCall, autocast_dtype, describe_call
from fp8dispatch.problem import Dgrad
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.router import Decision
from fp8dispatch.validate import Operands, check_operands, check_quantized


def fp8_linear(
    X: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: Sequence[int] | None = None,
    activation_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """A linear layer over an FP8 weight: ``X @ (weight * weight_scale).T + bias``.

    The activations are quantised on the way: one scale per token and block_k columns for block
    recipes (1x128 for 128x128 blocks, as in DeepSeek-V3), one per token for per-row and
    per-tensor weights, or the one given `activation_scale`. Gradients reach `X` (through the
    dequantised weight, or as an FP8 GEMM where a statement says ``dgrad="fp8"``) and `bias`; the
    weight and the scales are frozen.

    Args:
        X: [..., K] bfloat16, float16 or float32; any strides and leading shape, M = 0 included.
        weight: [N, K] float8_e4m3fn, float8_e5m2 or their FNUZ forms. A transposed view [K, N]
            is taken where N and K tell it apart; a square weight is read as [N, K].
        weight_scale: multipliers, ``value = data * scale``, in float32, bfloat16, float16,
            float8_e8m0fnu or uint8 (E8M0 exponents): one element (per tensor), [N] or [N, 1]
            (per row), [ceil(N / bn), ceil(K / bk)] (blocks of 128x128) or [N, ceil(K / g)]
            (groups of g = 32, 64 or 128). Checkpoints call it ``weight_scale`` or
            ``weight_scale_inv``; both are multipliers.
        bias: [N], added once, in fp32 where the backend fuses it.
        block_size: (bn, bk) of a block scale; states what else is inferred from the shape, from
            ``weight.block_size`` or from ``weight_scale.block_size``.
        activation_scale: one positive element: static activations.
        out_dtype: bfloat16, float16 or float32; default is autocast's dtype under autocast, else
            the dtype of X.
        backend: run this backend or raise; None takes the first that fits (see `explain`).

    Returns:
        [..., N] in `out_dtype`. A NaN or infinity in a row of X makes that row non-finite and
        touches no other. Meta tensors give a meta tensor.

    Raises:
        InvalidInputError: arguments that do not fit (ShapeError, AmbiguousRecipeError,
            DTypeError, DeviceError, ScaleValueError).
        UnknownBackendError, ConfigurationError: a backend name or variable that cannot be read.
        BackendUnavailableError: every allowed backend refused; the message holds each reason. Also
            where an FP8 gradient of X is stated that this weight cannot have.
        FrozenWeightError: in backward, when the weight or a scale requires grad.
        UnsupportedTransformError: under torch.func.vmap or forward-mode differentiation.
    """
    traced = is_traced(X, weight)
    if not traced:
        out = plans.run(
            X, weight, weight_scale, bias, activation_scale, block_size, out_dtype, backend
        )
        if out is not None:
            return out
        check_transforms(X, weight, weight_scale, bias, activation_scale)
    check_activations("X", X)
    operands = check_operands(weight, weight_scale, X.shape[-1], block_size)
    check_device("X", X, weight)
    check_activation_scale(activation_scale, weight)
    check_bias(bias, operands.weight.shape[0], weight)
    check_out_dtype(out_dtype)
    autocast = autocast_dtype(X)
    resolved = out_dtype or autocast or X.dtype
    if traced:
        return ops.linear(
            X, weight, weight_scale, bias, activation_scale, operands, resolved, backend
        )
    call = _describe(operands, weight_scale, resolved, backend)
    tensors = (X, weight, weight_scale, bias, activation_scale)
    out = _apply(*tensors, call, autocast is not None)
    plans.keep(*tensors, block_size, out_dtype, backend, call)
    return out


def fp8_linear_quantized(
    X: QuantizedActivation,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: Sequence[int] | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> torch.Tensor:
    """`fp8_linear` on activations quantised once, so that q/k/v or gate/up share the work.

    Args:
        X: from ``QuantizedActivation.from_tensor(x, group_size=block_k)`` for block recipes,
            without a group size for per-row and per-tensor weights.
        weight, weight_scale, bias, block_size, backend: as in `fp8_linear`.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        [..., N] in `out_dtype`. Gradients reach the bias only.

    Raises:
        The errors of `fp8_linear`; ShapeError also when the activations' groups do not match.
    """
    if not isinstance(X, QuantizedActivation):
        raise DTypeError(
            f"X must be a QuantizedActivation, found {type(X).__name__}; make one with "
            f"QuantizedActivation.from_tensor"
        )
    traced = is_traced(X.data, weight)
    if not traced:
        check_transforms(X.data, weight, weight_scale, bias)
    if X.data.requires_grad or X.scale.requires_grad:
        raise FrozenWeightError(
            "quantised activations carry no gradient; pass the unquantised X to fp8_linear"
        )
    operands = check_operands(weight, weight_scale, X.data.shape[-1], block_size)
    check_device("X.data", X.data, weight)
    matrix = check_quantized(X, operands)
    check_bias(bias, operands.weight.shape[0], weight)
    check_out_dtype(out_dtype)
    autocast = autocast_dtype(X.data)
    out_dtype = out_dtype or autocast or torch.bfloat16
    if traced:
        return ops.linear_quantized(X, weight, weight_scale, bias, operands, out_dtype, backend)
    call = _describe(operands, weight_scale, out_dtype, backend, matrix)
    return _apply(X.data, weight, weight_scale, bias, None, call, autocast is not None)


def explain(
    X: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: Sequence[int] | None = None,
    activation_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    dgrad: bool | None = None,
) -> Decision:
    """Which backend `fp8_linear` would run for the same arguments, and why not the others.

    Nothing of the call is computed; a backend that is about to be chosen and was never tested here
    runs its canary first. The decision renders as text with ``str`` and as JSON with ``as_json``.

    Args:
        X, weight, weight_scale, bias, block_size, activation_scale, out_dtype, backend: as in
            `fp8_linear`.
        dgrad: also say how dX is computed (`Decision.gradient` and `Decision.dgrad`); None does
            so where a call records a gradient of X.

    Raises:
        The errors of `fp8_linear`.
    """
    check_activations("X", X)
    operands = check_operands(weight, weight_scale, X.shape[-1], block_size)
    check_device("X", X, weight)
    check_activation_scale(activation_scale, weight)
    check_bias(bias, operands.weight.shape[0], weight)
    check_out_dtype(out_dtype)
    out_dtype = out_dtype or autocast_dtype(X) or X.dtype
    call = _describe(operands, weight_scale, out_dtype, backend)
    m = X.numel() // X.shape[-1]
    problem = describe_call(m, operands.weight, call, bias, activation_scale is not None)
    decision = decide(problem, X.device, call.allowed)
    if not (torch.is_grad_enabled() and X.requires_grad if dgrad is None else dgrad):
        return decision
    if call.allowed.dgrad is Dgrad.DEQUANTIZED:
        n, k = operands.weight.shape
        told = dequantized_grad.sentence(m, n, k, X.device, out_dtype)
        return replace(decision, gradient=told)
    product = fp8_dgrad.explain(m, operands.weight, call.recipe, X.dtype, call.allowed)
    return replace(decision, gradient=f"as an FP8 GEMM, by {product.backend}", dgrad=product)


def _describe(
    operands: Operands,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
    backend: str | None,
    quantized: QuantizedActivation | None = None,
) -> LinearCall:
    return LinearCall(
        operands.recipe,
        operands.transposed,
        operands.scale is not weight_scale,
        out_dtype,
        policy.resolve(backend, registry.NAMES),
        quantized,
    )


def _apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    call: LinearCall,
    autocast: bool,
) -> torch.Tensor:
    if autocast:
        # Our own casts are all stated; autocast inside would change fp32 sums to 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            return autograd.apply(x, weight, weight_scale, bias, activation_scale, call)
    return autograd.apply(x, weight, weight_scale, bias, activation_scale, call)
