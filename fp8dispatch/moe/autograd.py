"""The autograd Function of expert matmuls; the weights and all scales are frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fp8dispatch.autograd import frozen
from fp8dispatch.checks import VMAP_REFUSED, unwrapped
from fp8dispatch.errors import UnsupportedTransformError
from fp8dispatch.moe import dgrad, execute, gradient
from fp8dispatch.moe.routing import Routing
from fp8dispatch.policy import Policy
from fp8dispatch.problem import Dgrad
from fp8dispatch.recipe import Recipe

TENSORS = ("x", "weight", "weight_scale", "index", "bias", "activation_scale", "gather", "scatter")
"""The tensors of a call, in the order that `execute.forward` takes them."""

_FROZEN = ("weight", "weight_scale", "activation_scale")


def apply(*arguments: Any) -> torch.Tensor:
    """Run `execute.forward` of these arguments, recording a gradient only where one can be asked.

    Args:
        arguments: the `TENSORS`, and an `ExpertsCall`.

    Raises:
        BackendUnavailableError: the policy states an FP8 dgrad that these weights cannot have.
    """
    tensors = arguments[: len(TENSORS)]
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    ):
        x, weight, _, index, _, _, gather, scatter, call = arguments
        if call.allowed.dgrad is Dgrad.FP8 and x.requires_grad:
            experts = weight.shape[0]
            routing = execute.route_of(
                x.shape[0], experts, index, gather, scatter, batched=call.batched
            )
            dgrad.admit(x, weight, routing, call.recipe, call.allowed)
        out: torch.Tensor = ExpertsFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        return out
    return execute.forward(*arguments)


class ExpertsFunction(torch.autograd.Function):
    """``Y[r] = X[r] @ dequantised(W[e(r)]).T + bias[e(r)]``, all frozen but X and the bias.

    Gradients: dX [T, K] in X's dtype, through the dequantised weights in dY's dtype or as the
    call's policy says (`moe.dgrad`); dBias [E, N] summed in fp32. Rows of no expert give and get
    zeros. Saved for backward: the weight, its scale and the routing; never X itself.
    """

    @staticmethod
    def forward(*arguments: Any) -> torch.Tensor:
        return execute.forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, weight_scale, index, bias, _, gather, scatter, call = inputs
        ctx.call = call
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        # The weight has the number of experts also where its values are not needed.
        saved = (weight, weight_scale) if ctx.needs_input_grad[0] else (None, None)
        ctx.experts = weight.shape[0]
        ctx.save_for_backward(*saved, index, gather, scatter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for name in _FROZEN:
            if ctx.needs_input_grad[TENSORS.index(name)]:
                raise frozen(name)
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[TENSORS.index("bias")]
        grad_x = grad_bias = None
        if grad.is_meta:
            if needs_x:
                grad_x = torch.empty(ctx.x_shape, dtype=ctx.x_dtype, device="meta")
            if needs_bias:
                grad_bias = torch.empty(ctx.bias_shape, dtype=ctx.bias_dtype, device="meta")
            return _gradients(grad_x, grad_bias)
        grad = unwrapped(grad)
        # Under torch.func.grad each operation would wrap its result again, hiding it from kernels.
        with torch._C._DisableFuncTorch(), torch.autocast(grad.device.type, enabled=False):
            saved: tuple[Any, ...] = tuple(
                None if tensor is None else unwrapped(tensor) for tensor in ctx.saved_tensors
            )
            weight, weight_scale, index, gather, scatter = saved
            routing = execute.route_of(
                ctx.x_shape[0], ctx.experts, index, gather, scatter, batched=ctx.call.batched
            )
            if needs_x:
                call = ctx.call
                grad_x = input_gradient(
                    grad, weight, weight_scale, routing, call.recipe, ctx.x_dtype, call.allowed
                )
            if needs_bias:
                grad_bias = gradient.grad_bias(grad, routing, ctx.bias_dtype)
        return _gradients(grad_x, grad_bias)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refused: a batched weight or activation has no meaning here."""
        raise UnsupportedTransformError(VMAP_REFUSED.replace("fp8_linear", "an expert matmul"))


def input_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    routing: Routing,
    recipe: Recipe,
    dtype: torch.dtype,
    allowed: Policy | None,
) -> torch.Tensor:
    """dX [T, K] in `dtype`, in the way that the policy states; None states nothing."""
    if allowed is not None and allowed.dgrad is Dgrad.FP8:
        return dgrad.grad_input(grad, weight, weight_scale, routing, recipe, dtype, allowed)
    weights = execute.decoded_weights(weight, weight_scale, recipe)
    return gradient.grad_input(grad, weights, routing).to(dtype)


def _gradients(
    grad_x: torch.Tensor | None, grad_bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """One for each argument of `forward`, the call among them."""
    named = {"x": grad_x, "bias": grad_bias}
    return (*(named.get(name) for name in TENSORS), None)
