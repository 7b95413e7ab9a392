"""`rms_norm_linear` and `silu_mul_linear`: an operation, its quantisation, an FP8 linear, trained.

The forward pass runs the fused quantiser and the linear on its result. Backward takes dY through
the weight, as `fp8_linear` does, and on through the operation, whose inputs are what is saved.
Rounding to FP8 counts as the identity, as everywhere in this library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch

from fp8dispatch import autograd, dgrad, policy, registry
from fp8dispatch.checks import (
    VMAP_REFUSED,
    check_bias,
    check_device,
    check_out_dtype,
    check_transforms,
    is_traced,
    unwrapped,
)
from fp8dispatch.errors import UnsupportedTransformError
from fp8dispatch.execute import autocast_dtype
from fp8dispatch.formats import activation_float8
from fp8dispatch.fused_operations import Operation, RMSNorm, SiluMul
from fp8dispatch.linear import fp8_linear, fp8_linear_quantized
from fp8dispatch.policy import Policy
from fp8dispatch.quantization import fused
from fp8dispatch.quantization.fused_activation import (
    check_gate,
    check_norm,
)
from fp8dispatch.recipe import Recipe
from fp8dispatch.validate import Operands, check_operands

_Gradients = tuple[torch.Tensor | None, ...]


@overload
def rms_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: None = None,
    block_size: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def rms_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor,
    block_size: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    block_size: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``fp8_linear(rms_norm(x + residual), weight, ...)`` without the norm's result in memory.

    Gradients reach `x`, `residual`, `norm_weight` and `bias`; the weight and its scale are frozen.

    Args:
        x, norm_weight, eps, residual: as in `rms_norm_quantize`.
        weight, weight_scale, bias, block_size, out_dtype, backend: as in `fp8_linear`.

    Returns:
        [..., N] in `out_dtype`; with `residual` also the sum [..., K] in x's dtype.

    Raises:
        The errors of `rms_norm_quantize` and `fp8_linear`.
    """
    traced = is_traced(x, weight)
    if not traced:
        check_transforms(x, norm_weight, residual, weight, weight_scale, bias)
    check_norm(x, norm_weight, eps, residual)
    linear, resolved = _check_linear(x, weight, weight_scale, bias, block_size, out_dtype)
    if traced or x.is_meta:
        total = None if residual is None else x + residual
        hidden = fused.normalize(x if total is None else total, norm_weight, eps)
        out = fp8_linear(
            hidden, weight, weight_scale, bias,
            block_size=block_size, out_dtype=resolved, backend=backend,
        )  # fmt: skip
        return out if total is None else (out, total)
    call = _call(RMSNorm(eps), x, (norm_weight, residual), linear, weight_scale, resolved, backend)
    outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = _FusedLinear.apply(  # type: ignore[no-untyped-call]
        call, weight, weight_scale, bias, x, norm_weight, residual
    )
    return outputs


def silu_mul_linear(
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``fp8_linear(silu(gate) * up, weight, ...)`` without the product in memory.

    Gradients reach `gate`, `up` and `bias`; the weight and its scale are frozen.

    Args:
        gate, up: as in `silu_mul_quantize`.
        weight, weight_scale, bias, block_size, out_dtype, backend: as in `fp8_linear`.

    Returns:
        [..., N] in `out_dtype`.

    Raises:
        The errors of `silu_mul_quantize` and `fp8_linear`.
    """
    traced = is_traced(gate, weight)
    if not traced:
        check_transforms(gate, up, weight, weight_scale, bias)
    check_gate(gate, up)
    linear, resolved = _check_linear(gate, weight, weight_scale, bias, block_size, out_dtype)
    if traced or gate.is_meta:
        return fp8_linear(
            fused.silu_mul(gate, up), weight, weight_scale, bias,
            block_size=block_size, out_dtype=resolved, backend=backend,
        )  # fmt: skip
    call = _call(SiluMul(), gate, (up,), linear, weight_scale, resolved, backend)
    out: torch.Tensor = _FusedLinear.apply(  # type: ignore[no-untyped-call]
        call, weight, weight_scale, bias, gate, up, None
    )
    return out


def _check_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    block_size: Sequence[int] | None,
    out_dtype: torch.dtype | None,
) -> tuple[Operands, torch.dtype]:
    """The linear's operands for rows like those of x, and the dtype of its output."""
    operands = check_operands(weight, weight_scale, x.shape[-1], block_size)
    check_device("x", x, weight)
    check_bias(bias, operands.weight.shape[0], weight)
    check_out_dtype(out_dtype)
    return operands, out_dtype or autocast_dtype(x) or x.dtype


@dataclass(frozen=True)
class _Call:
    """What a fused linear means beside its tensors."""

    operation: Operation
    recipe: Recipe
    transposed: bool
    scale_transposed: bool
    out_dtype: torch.dtype
    backend: str | None
    allowed: Policy


def _call(
    operation: Operation,
    x: torch.Tensor,
    others: tuple[torch.Tensor | None, ...],
    linear: Operands,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
    backend: str | None,
) -> _Call:
    """The call, once it is known that its inputs can have their gradients as the policy says."""
    allowed = policy.resolve(backend, registry.NAMES)
    trained = [one for one in (x, *others) if one is not None and one.requires_grad]
    if torch.is_grad_enabled() and trained:
        dgrad.admit(x, linear.weight, linear.recipe, allowed)
    flipped = linear.scale is not weight_scale
    return _Call(operation, linear.recipe, linear.transposed, flipped, out_dtype, backend, allowed)


class _FusedLinear(torch.autograd.Function):
    """``Y = quantised(operation(first, second)) @ dequantised(W).T + bias``, the weight frozen.

    Saved for backward: both inputs of the operation (the sum in place of x and its residual), the
    weight and its scale; never the operation's result.
    """

    @staticmethod
    def forward(
        call: _Call,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        block = call.recipe.block_size
        quantized, total = call.operation.quantize(
            first, second, residual, block and block[1], activation_float8(weight.dtype)
        )
        out = fp8_linear_quantized(
            quantized, weight, weight_scale, bias,
            block_size=block, out_dtype=call.out_dtype, backend=call.backend,
        )  # fmt: skip
        return out if total is None else (out, total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call, weight, weight_scale, bias, first, second, residual = inputs
        ctx.call = call
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad[4:]):
            hidden = first if residual is None else output[1]
            ctx.save_for_backward(weight, weight_scale, hidden, second)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None = None
    ) -> _Gradients:
        for index, name in ((1, "weight"), (2, "weight_scale")):
            if ctx.needs_input_grad[index]:
                raise autograd.frozen(name)
        # As in FP8LinearFunction: no wrappers around results, and sums as they are stated.
        arrived = [None if part is None else unwrapped(part) for part in (grad, grad_total)]
        saved = [unwrapped(part) for part in ctx.saved_tensors]
        sources = [part for part in (*arrived, *saved) if part is not None]
        if not sources:
            return (None,) * 7
        device_type, graph = sources[0].device.type, torch.is_grad_enabled()
        with torch._C._DisableFuncTorch(), torch.autocast(device_type, enabled=False):
            with torch.no_grad():
                gradients = _gradients(ctx, arrived[0], arrived[1], *saved)
            if graph and any(part.requires_grad for part in sources):
                return _differentiated_once(gradients)
        return gradients

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refused: a batched weight or activation has no meaning here."""
        raise UnsupportedTransformError(VMAP_REFUSED)


def _gradients(
    ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None, *saved: torch.Tensor
) -> _Gradients:
    """What backward returns, as far as it is needed."""
    needs = ctx.needs_input_grad
    grad_bias: torch.Tensor | None = None
    of_first: torch.Tensor | None = None
    of_second: torch.Tensor | None = None
    if grad is not None:
        if needs[3]:
            grad_bias = autograd.bias_gradient(grad, ctx.bias_dtype)
        if any(needs[4:]):
            of_first, of_second = _input_gradients(grad, ctx.call, *saved)
    if grad_total is not None:  # the next layer's share of the sum
        of_first = grad_total if of_first is None else of_first + grad_total
    return (
        None,
        None,
        None,
        grad_bias,
        of_first if needs[4] else None,
        of_second if needs[5] else None,
        of_first if needs[6] else None,
    )


def _differentiated_once(gradients: _Gradients) -> _Gradients:
    """Gradients that raise when they are differentiated in turn.

    torch's `once_differentiable` does so only where dY requires a gradient; here the gradients
    depend on the inputs too, and a second derivative would be left out silently.
    """
    tensors = [None if tensor is None else tensor.detach() for tensor in gradients]
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad = True  # torch.func refuses the method, not the attribute
    refuse = torch._C._functions.DelayedError(
        b"the gradient of rms_norm_linear and silu_mul_linear has no gradient; differentiate once",
        len(tensors),
    )
    refusing: _Gradients = refuse(*tensors)  # type: ignore[arg-type]  # takes None as well
    return refusing


def _input_gradients(
    grad: torch.Tensor,
    call: _Call,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the operation's inputs in their dtypes."""
    data = weight.t() if call.transposed else weight
    scale = weight_scale.t() if call.scale_transposed else weight_scale
    n, _ = data.shape
    of_result = autograd.input_gradient(
        grad.reshape(-1, n), data, scale, call.recipe, first.dtype, call.allowed
    )
    of_first, of_second = call.operation.gradients(
        of_result.float().view(first.shape), first, second
    )
    return of_first.to(first.dtype), of_second.to(second.dtype)
