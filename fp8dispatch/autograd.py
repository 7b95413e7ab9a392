"""The one autograd Function: the forward of `linear`, dX as the call's policy says, dBias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fp8dispatch import dequantized_grad, dgrad, execute
from fp8dispatch.checks import VMAP_REFUSED, unwrapped
from fp8dispatch.errors import FrozenWeightError, UnsupportedTransformError
from fp8dispatch.execute import LinearCall
from fp8dispatch.policy import Policy
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.problem import Dgrad
from fp8dispatch.recipe import Recipe


def apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    call: LinearCall,
    compute: Callable[..., torch.Tensor] = execute.forward,
) -> torch.Tensor:
    """Run the call, recording a gradient only where one can be asked for.

    Args:
        compute: what computes the forward pass from these arguments, up to `call`.

    Raises:
        BackendUnavailableError: the policy states an FP8 dgrad that X's gradient cannot have.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or weight_scale.requires_grad
        or (bias is not None and bias.requires_grad)
        or (activation_scale is not None and activation_scale.requires_grad)
    ):
        if call.allowed.dgrad is Dgrad.FP8 and x.requires_grad:
            data, _ = execute.oriented(weight, weight_scale, call)
            dgrad.admit(x, data, call.recipe, call.allowed)
        out: torch.Tensor = FP8LinearFunction.apply(  # type: ignore[no-untyped-call]
            x, weight, weight_scale, bias, activation_scale, call, compute
        )
        return out
    return compute(x, weight, weight_scale, bias, activation_scale, call)


class FP8LinearFunction(torch.autograd.Function):
    """``Y = X @ dequantised(W).T + bias`` with the weight and all scales frozen.

    Shapes: X [..., K], W [N, K] (or transposed), Y [..., N]. Gradients: dX [..., K] in X's dtype
    through the dequantised weight in dY's dtype, or as an FP8 GEMM where the policy of the forward
    call says so (`fp8dispatch.dgrad`); dBias [N] summed in fp32. Saved for backward:
    the weight and its scale, and only when X needs a gradient; never X itself.
    """

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation_scale: torch.Tensor | None,
        call: LinearCall,
        compute: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        return compute(x, weight, weight_scale, bias, activation_scale, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, weight_scale, bias, _, call, _ = inputs
        ctx.call = call
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(weight, weight_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for index, name in ((1, "weight"), (2, "weight_scale"), (4, "activation_scale")):
            if ctx.needs_input_grad[index]:
                raise frozen(name)
        grad_x = grad_bias = None
        if grad.is_meta:
            shapes = (ctx.x_shape, ctx.x_dtype), (grad.shape[-1:], ctx.bias_dtype)
            grad_x, grad_bias = (
                torch.empty(shape, dtype=dtype, device="meta") if needed else None
                for needed, (shape, dtype) in zip(
                    (ctx.needs_input_grad[0], ctx.needs_input_grad[3]), shapes, strict=True
                )
            )
            return grad_x, None, None, grad_bias, None, None, None
        grad = unwrapped(grad)
        # Under torch.func.grad each operation would wrap its result again, hiding it from kernels.
        with torch._C._DisableFuncTorch(), torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                weight, weight_scale = map(unwrapped, ctx.saved_tensors)
                data, scale = execute.oriented(weight, weight_scale, ctx.call)
                flat = grad.reshape(-1, grad.shape[-1])
                allowed = ctx.call.allowed
                grad_x = input_gradient(flat, data, scale, ctx.call.recipe, ctx.x_dtype, allowed)
                grad_x = grad_x.to(ctx.x_dtype).view(ctx.x_shape)
            if ctx.needs_input_grad[3]:
                grad_bias = bias_gradient(grad, ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refused: a batched weight or activation has no meaning here."""
        raise UnsupportedTransformError(VMAP_REFUSED)


def frozen(name: str) -> FrozenWeightError:
    """The error for a gradient asked of the weight or a scale."""
    return FrozenWeightError(
        f"{name} requires grad, but FP8 weights and scales are frozen; call "
        f"{name}.requires_grad_(False) and train the bias, adapters or other layers"
    )


def bias_gradient(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dBias [N] of dY [..., N], summed in fp32."""
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


def input_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    allowed: Policy | None,
) -> torch.Tensor:
    """dX [M, K] of dY [M, N], in the way that the policy states; None states nothing.

    Args:
        weight, weight_scale: oriented as [N, K]; the scale as the caller has it.
        dtype: of dX where an FP8 GEMM computes it; through the dequantised weight it is dY's.
    """
    if allowed is not None and allowed.dgrad is Dgrad.FP8:
        return dgrad.grad_input(grad, weight, weight_scale, recipe, dtype, allowed)
    scale = weight_scale_fp32(weight_scale, recipe, *weight.shape)
    return dequantized_grad.grad_input(grad, weight, scale, recipe)
