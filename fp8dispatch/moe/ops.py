"""What torch.compile, torch.export and fake tensors see of an expert matmul: opaque operators.

| operator (``torch.ops.fp8dispatch``) | computes                                             |
|--------------------------------------|------------------------------------------------------|
| ``experts``                          | `fp8_experts_batched` and `fp8_experts_grouped`      |
| ``experts_grad_input``               | the gradient of x                                    |
| ``experts_grad_bias``                | the gradient of the bias                             |

They follow the rules of `fp8dispatch.ops`, whose ``frozen_gradient`` they share: arguments are
checked as in an eager call, and values are read and backends chosen when an operator runs, on real
sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import register_autograd

from fp8dispatch import graph_policy, policy, registry
from fp8dispatch import ops as linear_ops
from fp8dispatch.checks import check_activations, check_choice
from fp8dispatch.errors import UnsupportedTransformError
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.moe import dgrad, execute, gradient
from fp8dispatch.moe.autograd import TENSORS, input_gradient
from fp8dispatch.moe.execute import ExpertsCall
from fp8dispatch.moe.routing import check_values
from fp8dispatch.moe.validate import ExpertOperands, check_call, check_expert_operands
from fp8dispatch.oplibrary import LIBRARY, define, register, without_autocast
from fp8dispatch.recipe import Recipe

_ROUTING = "Tensor index, Tensor? gather, Tensor? scatter, bool batched"
for _schema in (
    "experts(Tensor x, Tensor weight, Tensor weight_scale, Tensor index, Tensor? bias, "
    "Tensor? activation_scale, Tensor? gather, Tensor? scatter, bool batched, int block_n, "
    "int block_k, ScalarType out_dtype, str backend, bool debug, str dgrad='') -> Tensor",
    f"experts_grad_input(Tensor grad, Tensor weight, Tensor weight_scale, {_ROUTING}, "
    f"SymInt inputs, int block_n, int block_k, ScalarType dtype, str dgrad='') -> Tensor",
    f"experts_grad_bias(Tensor grad, {_ROUTING}, SymInt inputs, SymInt experts, ScalarType dtype) "
    f"-> Tensor",
):
    define(_schema)
"""As the schemas of `fp8dispatch.ops`."""


def experts(
    tensors: tuple[Any, ...],
    operands: ExpertOperands,
    out_dtype: torch.dtype,
    backend: str | None,
    *,
    batched: bool,
    debug: bool,
) -> torch.Tensor:
    """Record a checked call; `tensors` are the `TENSORS` of `moe.autograd`."""
    from fp8dispatch.graph_recording import dgrad_of  # it imports the compiler

    block = operands.recipe.block_size or (0, 0)
    out: torch.Tensor = torch.ops.fp8dispatch.experts.default(
        *tensors, batched, *block, out_dtype, backend or "", debug, dgrad_of(tensors[0], backend)
    )
    return out


def _check(*arguments: Any) -> ExpertOperands:
    tensors = arguments[: len(TENSORS)]
    batched, block_n, block_k, out_dtype, backend = arguments[len(TENSORS) : len(TENSORS) + 5]
    check_choice("out_dtype", out_dtype, ACTIVATION_DTYPES)
    policy.check_backend(backend or None, registry.NAMES)
    return check_call(*tensors, block_size=linear_ops.stated(block_n, block_k), batched=batched)


def _experts(*arguments: Any) -> torch.Tensor:
    operands = _check(*arguments)
    x, weight, weight_scale, index, bias, activation_scale, gather, scatter, *_ = arguments
    batched, _, _, out_dtype, backend, debug, *others = arguments[len(TENSORS) :]
    text = "".join(others)  # about dgrad; torch leaves out an argument that has its default value
    routing = execute.route_of(x.shape[0], weight.shape[0], index, gather, scatter, batched=batched)
    if debug:
        check_values(routing)
    allowed = policy.resolve(backend or None, registry.NAMES)
    graph_policy.check(text, allowed)
    if text:
        dgrad.admit(x, weight, routing, operands.recipe, allowed)
    with without_autocast(x):
        return execute.forward(
            x, weight, weight_scale, index, bias, activation_scale, gather, scatter,
            ExpertsCall(operands.recipe, out_dtype, allowed, batched),
        )  # fmt: skip


def _experts_fake(*arguments: Any) -> torch.Tensor:
    _check(*arguments)
    x, weight, gather = arguments[0], arguments[1], arguments[TENSORS.index("gather")]
    rows = x.shape[0] if gather is None else gather.shape[0]
    out: torch.Tensor = x.new_empty((rows, weight.shape[1]), dtype=arguments[len(TENSORS) + 3])
    return out


def _grad_input(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    index: torch.Tensor,
    gather: torch.Tensor | None,
    scatter: torch.Tensor | None,
    batched: bool,
    inputs: int,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
    dgrad: str = "",
) -> torch.Tensor:
    recipe = _check_grad(grad, weight, weight_scale, block_n, block_k, dtype)
    routing = execute.route_of(inputs, weight.shape[0], index, gather, scatter, batched=batched)
    allowed = graph_policy.decode(dgrad)
    with without_autocast(grad):
        return input_gradient(grad, weight, weight_scale, routing, recipe, dtype, allowed)


def _grad_input_fake(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    index: torch.Tensor,
    gather: torch.Tensor | None,
    scatter: torch.Tensor | None,
    batched: bool,
    inputs: int,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
    dgrad: str = "",
) -> torch.Tensor:
    _check_grad(grad, weight, weight_scale, block_n, block_k, dtype)
    return grad.new_empty((inputs, weight.shape[2]), dtype=dtype)


def _check_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
) -> Recipe:
    check_activations("grad", grad)
    check_choice("dtype", dtype, ACTIVATION_DTYPES)
    block = linear_ops.stated(block_n, block_k)
    return check_expert_operands(weight, weight_scale, weight.shape[-1], block).recipe


def _grad_bias(
    grad: torch.Tensor,
    index: torch.Tensor,
    gather: torch.Tensor | None,
    scatter: torch.Tensor | None,
    batched: bool,
    inputs: int,
    experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_activations("grad", grad)
    check_choice("dtype", dtype, ACTIVATION_DTYPES)
    routing = execute.route_of(inputs, experts, index, gather, scatter, batched=batched)
    with without_autocast(grad):
        return gradient.grad_bias(grad, routing, dtype)


def _grad_bias_fake(
    grad: torch.Tensor,
    index: torch.Tensor,
    gather: torch.Tensor | None,
    scatter: torch.Tensor | None,
    batched: bool,
    inputs: int,
    experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return grad.new_empty((experts, grad.shape[-1]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    named = dict(zip(TENSORS, inputs, strict=False))
    needs = dict(zip(TENSORS, ctx.needs_input_grad, strict=False))
    ctx.batched, block_n, block_k = inputs[len(TENSORS) : len(TENSORS) + 3]
    ctx.block = block_n, block_k
    ctx.dgrad = "".join(inputs[len(TENSORS) + 6 :])
    ctx.inputs, ctx.experts = named["x"].shape[0], named["weight"].shape[0]
    ctx.x_dtype = named["x"].dtype
    ctx.bias_dtype = None if named["bias"] is None else named["bias"].dtype
    kept = {
        "weight": needs["x"] or needs["weight"],
        "weight_scale": needs["x"] or needs["weight_scale"],
        "activation_scale": needs["activation_scale"],
    }
    ctx.save_for_backward(
        *(named[name] if needed else None for name, needed in kept.items()),
        *(named[name] for name in ("index", "gather", "scatter")),
    )


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    operators = torch.ops.fp8dispatch
    weight, weight_scale, activation_scale, *routing = ctx.saved_tensors
    needs = dict(zip(TENSORS, ctx.needs_input_grad, strict=False))
    grads: dict[str, torch.Tensor] = {}
    for name, tensor in (
        ("weight", weight),
        ("weight_scale", weight_scale),
        ("activation_scale", activation_scale),
    ):
        if needs[name]:
            grads[name] = operators.frozen_gradient.default(tensor, grad, name)
    if needs["x"]:
        grads["x"] = operators.experts_grad_input.default(
            grad, weight, weight_scale, *routing, ctx.batched, ctx.inputs, *ctx.block, ctx.x_dtype,
            ctx.dgrad,
        )  # fmt: skip
    if needs["bias"]:
        grads["bias"] = operators.experts_grad_bias.default(
            grad, *routing, ctx.batched, ctx.inputs, ctx.experts, ctx.bias_dtype
        )
    others = len(ctx.needs_input_grad) - len(TENSORS)
    return (*(grads.get(name) for name in TENSORS), *(None for _ in range(others)))


def _no_second_gradient(ctx: Any, grad: torch.Tensor) -> Any:
    raise UnsupportedTransformError(
        "the gradient of an expert matmul has no gradient, found create_graph=True or transforms "
        "inside each other; differentiate once"
    )


register("experts", _experts, _experts_fake)
register("experts_grad_input", _grad_input, _grad_input_fake)
register("experts_grad_bias", _grad_bias, _grad_bias_fake)
register_autograd("fp8dispatch::experts", _backward, setup_context=_save, lib=LIBRARY)
for _name in ("experts_grad_input", "experts_grad_bias"):
    register_autograd(f"fp8dispatch::{_name}", _no_second_gradient, lib=LIBRARY)
