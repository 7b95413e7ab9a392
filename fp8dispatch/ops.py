"""What torch.compile, torch.export and fake tensors see of a call: opaque operators.

| operator (``torch.ops.fp8dispatch``) | computes                                                 |
|--------------------------------------|----------------------------------------------------------|
| ``linear``                           | `fp8_linear`                                             |
| ``linear_quantized``                 | `fp8_linear_quantized`                                   |
| ``linear_grad_input``                | the gradient of X                                        |
| ``quantize_activation``              | ``QuantizedActivation.from_tensor`` (`quantization.op`)  |
| ``frozen_gradient``                  | nothing: it raises when a backward pass runs it          |

An operator checks its arguments as the eager call does, and reads scale values and chooses a
backend when it runs, on real sizes: the graph holds no decision and needs no guard on M. Of what
states a policy the argument ``backend=`` is part of the graph, and what is stated about dgrad
(`fp8dispatch.graph_policy`). The rest is read at each run, by the thread that runs it; what a
backward pass recomputes is run by the thread of that pass. A CUDA graph replays what was chosen
when it was captured.

Eager calls do not come here: the dispatcher of torch.library costs more than all of the front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import register_autograd

from fp8dispatch import autograd, dgrad, execute, graph_policy, plans, policy, registry
from fp8dispatch.checks import (
    check_activation_scale,
    check_activations,
    check_bias,
    check_choice,
    check_device,
)
from fp8dispatch.errors import ShapeError, UnsupportedTransformError
from fp8dispatch.execute import LinearCall
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.oplibrary import LIBRARY, define, register, without_autocast
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.validate import Operands, check_operands, check_quantized

_WEIGHT = "Tensor weight, Tensor weight_scale"
_RECIPE = "int block_n, int block_k"
for _schema in (
    f"linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? activation_scale, {_RECIPE}, "
    f"ScalarType out_dtype, str backend, str dgrad='') -> Tensor",
    f"linear_quantized(Tensor data, Tensor scale, {_WEIGHT}, Tensor? bias, {_RECIPE}, "
    f"ScalarType out_dtype, str backend) -> Tensor",
    f"linear_grad_input(Tensor grad, {_WEIGHT}, SymInt k, {_RECIPE}, ScalarType dtype, "
    f"str dgrad='') -> Tensor",
    "frozen_gradient(Tensor frozen, Tensor grad, str name) -> Tensor",
):
    define(_schema)
"""``block_n = block_k = 0`` means a recipe without blocks, ``backend = ""`` any backend; ``dgrad``
is a text of `fp8dispatch.graph_policy`."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    operands: Operands,
    out_dtype: torch.dtype,
    backend: str | None,
) -> torch.Tensor:
    """Record a checked call of `fp8_linear`."""
    from fp8dispatch.graph_recording import dgrad_of  # it imports the compiler

    block = operands.recipe.block_size or (0, 0)
    out: torch.Tensor = torch.ops.fp8dispatch.linear.default(
        x, weight, weight_scale, bias, activation_scale, *block, out_dtype, backend or "",
        dgrad_of(x, backend),
    )  # fmt: skip
    return out


def linear_quantized(
    x: QuantizedActivation,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    operands: Operands,
    out_dtype: torch.dtype,
    backend: str | None,
) -> torch.Tensor:
    """Record a checked call of `fp8_linear_quantized`."""
    block = operands.recipe.block_size or (0, 0)
    out: torch.Tensor = torch.ops.fp8dispatch.linear_quantized.default(
        x.data, x.scale, weight, weight_scale, bias, *block, out_dtype, backend or ""
    )
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    block_n: int,
    block_k: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Operands:
    """What the linear operators check alike; `x` is the activations or their quantised data.

    Raises:
        InvalidInputError, UnknownBackendError: what is wrong, in a sentence.
    """
    operands = check_operands(weight, weight_scale, x.shape[-1], stated(block_n, block_k))
    check_device("X", x, weight)
    check_bias(bias, operands.weight.shape[0], weight)
    check_choice("out_dtype", out_dtype, ACTIVATION_DTYPES)
    policy.check_backend(backend or None, registry.NAMES)
    return operands


def stated(block_n: int, block_k: int) -> tuple[int, int] | None:
    """The block size as an operator's integers say it; (0, 0) is none."""
    return (block_n, block_k) if (block_n, block_k) != (0, 0) else None


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    operands: Operands,
    out_dtype: torch.dtype,
    backend: str,
    quantized: QuantizedActivation | None = None,
    recorded_dgrad: str = "",
) -> tuple[LinearCall, torch.Tensor]:
    allowed = policy.resolve(backend or None, registry.NAMES)
    graph_policy.check(recorded_dgrad, allowed)
    if recorded_dgrad:
        dgrad.admit(x, operands.weight, operands.recipe, allowed)
    call = LinearCall(
        operands.recipe,
        operands.transposed,
        operands.scale is not weight_scale,
        out_dtype,
        allowed,
        quantized,
    )
    with without_autocast(x):
        out = execute.forward(x, weight, weight_scale, bias, activation_scale, call)
    return call, out.contiguous()  # which the fake promises; a copy only where N was padded


def _empty_output(x: torch.Tensor, operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], operands.weight.shape[0]), dtype=dtype)


def _check_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    *stated: Any,
) -> Operands:
    check_activations("X", x)
    operands = _check(x, weight, weight_scale, bias, *stated)
    check_activation_scale(activation_scale, weight)
    return operands


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    block_n: int,
    block_k: int,
    out_dtype: torch.dtype,
    backend: str,
    dgrad: str = "",  # torch leaves out an argument that has its default value
) -> torch.Tensor:
    tensors = (x, weight, weight_scale, bias, activation_scale)
    like = stated(block_n, block_k), out_dtype, backend or None
    if not dgrad:
        # The operator's own gradient is recorded around it: in here nothing is.
        with torch.no_grad():
            out = plans.run(*tensors, *like)
        if out is not None:
            return out.contiguous()
    operands = _check_linear(*tensors, block_n, block_k, out_dtype, backend)
    call, out = _run(*tensors, operands, out_dtype, backend, recorded_dgrad=dgrad)
    if not dgrad:
        plans.keep(*tensors, *like, call)
    return out


def _linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    block_n: int,
    block_k: int,
    out_dtype: torch.dtype,
    backend: str,
    dgrad: str = "",
) -> torch.Tensor:
    tensors = (x, weight, weight_scale, bias, activation_scale)
    operands = _check_linear(*tensors, block_n, block_k, out_dtype, backend)
    return _empty_output(x, operands, out_dtype)


def _check_linear_quantized(
    data: torch.Tensor, scale: torch.Tensor, *others: Any
) -> tuple[Operands, QuantizedActivation]:
    operands = _check(data, *others)
    return operands, check_quantized(QuantizedActivation(data, scale), operands)


def _linear_quantized(*arguments: Any) -> torch.Tensor:
    operands, quantized = _check_linear_quantized(*arguments)
    data, _, weight, weight_scale, bias, _, _, out_dtype, backend = arguments
    _, out = _run(
        data, weight, weight_scale, bias, None, operands, out_dtype, backend, quantized=quantized
    )
    return out


def _linear_quantized_fake(*arguments: Any) -> torch.Tensor:
    operands, _ = _check_linear_quantized(*arguments)
    return _empty_output(arguments[0], operands, arguments[-2])


def _check_linear_grad_input(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    k: int,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
) -> Operands:
    check_activations("grad", grad)
    operands = check_operands(weight, weight_scale, k, stated(block_n, block_k))
    check_device("grad", grad, weight)
    check_choice("dtype", dtype, ACTIVATION_DTYPES)
    n = operands.weight.shape[0]
    if grad.shape[-1] != n:
        raise ShapeError(f"grad must be [..., {n}] as the output is, found {list(grad.shape)}")
    return operands


def _linear_grad_input(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    k: int,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
    dgrad: str = "",
) -> torch.Tensor:
    operands = _check_linear_grad_input(grad, weight, weight_scale, k, block_n, block_k, dtype)
    rows = grad.reshape(-1, grad.shape[-1])
    allowed = graph_policy.decode(dgrad)
    with without_autocast(grad):
        out = autograd.input_gradient(
            rows, operands.weight, operands.scale, operands.recipe, dtype, allowed
        )
    return out.to(dtype).contiguous().view(*grad.shape[:-1], k)


def _linear_grad_input_fake(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    k: int,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
    dgrad: str = "",
) -> torch.Tensor:
    _check_linear_grad_input(grad, weight, weight_scale, k, block_n, block_k, dtype)
    return grad.new_empty((*grad.shape[:-1], k), dtype=dtype)


def _frozen_gradient(frozen: torch.Tensor, grad: torch.Tensor, name: str) -> torch.Tensor:
    raise autograd.frozen(name)


def _frozen_gradient_fake(frozen: torch.Tensor, grad: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(frozen)


def _register_gradients(name: str, tensors: tuple[str, ...]) -> None:
    """Gradients of X and the bias; a gradient asked of another of the `tensors` raises.

    It raises when the backward pass runs, as it does without a compiler: tracing a forward
    pass over Parameters, which require gradients by default, must not mind.
    """
    bias = tensors.index("bias")

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.block = inputs[len(tensors) : len(tensors) + 2]
        ctx.dgrad = "".join(inputs[len(tensors) + 4 :])  # of `linear` alone
        ctx.k, ctx.x_dtype = inputs[0].shape[-1], inputs[0].dtype
        ctx.bias_dtype = None if inputs[bias] is None else inputs[bias].dtype
        needed = list(ctx.needs_input_grad[: len(tensors)])
        needed[bias] = False
        if tensors[0] == "X":
            needed[1] |= needed[0]
            needed[2] |= needed[0]
            needed[0] = False
        ctx.save_for_backward(
            *(tensor if needs else None for tensor, needs in zip(inputs, needed, strict=False))
        )

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        operators = torch.ops.fp8dispatch
        grads: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
        for index, name in enumerate(tensors):
            if not ctx.needs_input_grad[index]:
                continue
            if name == "bias":
                grads[index] = autograd.bias_gradient(grad, ctx.bias_dtype)
            elif name == "X":
                _, weight, weight_scale, *_ = ctx.saved_tensors
                grads[index] = operators.linear_grad_input.default(
                    grad, weight, weight_scale, ctx.k, *ctx.block, ctx.x_dtype, ctx.dgrad
                )
            else:
                grads[index] = operators.frozen_gradient.default(
                    ctx.saved_tensors[index], grad, name
                )
        return tuple(grads)

    register_autograd(f"fp8dispatch::{name}", backward, setup_context=save, lib=LIBRARY)


def _no_second_gradient(ctx: Any, grad: torch.Tensor) -> Any:
    raise UnsupportedTransformError(
        "the gradient of fp8_linear has no gradient, found create_graph=True or transforms inside "
        "each other; differentiate once"
    )


register("linear", _linear, _linear_fake)
register("linear_quantized", _linear_quantized, _linear_quantized_fake)
register("linear_grad_input", _linear_grad_input, _linear_grad_input_fake)
register("frozen_gradient", _frozen_gradient, _frozen_gradient_fake)
_register_gradients("linear", ("X", "weight", "weight_scale", "bias", "activation_scale"))
_register_gradients("linear_quantized", ("X.data", "X.scale", "weight", "weight_scale", "bias"))
register_autograd("fp8dispatch::linear_grad_input", _no_second_gradient, lib=LIBRARY)
