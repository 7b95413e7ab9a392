"""The warm path: a call like one that was checked and decided before, after a few comparisons.

Checking the arguments, describing the call and looking the decision up costs many times what a
small GEMM takes on the host. Nearly all of it depends on the weight, its scale and the other
arguments that stay the same from call to call, so a `Plan` keeps the answers with them. `run`
compares everything that they rest on; whatever differs goes the whole way again:

* the same tensor objects for weight, scales and bias, over the same storage, with the same shapes,
  strides and version, as `prepare` asks of a scale that it has read;
* the same dtype and device of X, the same other arguments, the same `use_backend` statement and
  autocast dtype; the same `generation` (policy of the process, quarantine, verdicts);
* no compiler, no torch.func transform, no forward-mode differentiation, and X a plain tensor.

A plan keeps none of the caller's tensors alive, and is dropped with the first of them that goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _is_any_autocast_enabled as any_autocast_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from fp8dispatch import autograd, decide, execute, generation, policy, registry
from fp8dispatch.backends.contract import Weight
from fp8dispatch.execute import LinearCall, autocast_dtype, describe_call
from fp8dispatch.prepare import activation_scale_fp32, weight_scale_fp32
from fp8dispatch.problem import LinearProblem
from fp8dispatch.router import Decision

_Linear = Callable[..., torch.Tensor]
_Settled = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

# M changes from call to call; the bound keeps a long-running server's memory flat.
_MAX_ROWS = 1024


class _Held:
    """One of the caller's tensors as a plan found it."""

    __slots__ = ("reference", "shape", "storage", "stride", "version")

    def __init__(
        self,
        tensor: torch.Tensor,
        forget: Callable[[Any], None] | None = None,
        *,
        read_anew: bool = False,
    ) -> None:
        """Args: forget: called when the tensor is gone; read_anew: its values may change."""
        self.reference = weakref.ref(tensor, forget)
        self.storage = weakref.ref(tensor.untyped_storage())
        self.shape = tensor.shape
        self.stride = tensor.stride()
        # Inference tensors count no versions: their changes need `invalidate`.
        self.version = None if read_anew or tensor.is_inference() else tensor._version

    def is_still(self, tensor: torch.Tensor) -> bool:
        """It is the same tensor, unchanged as far as torch can tell."""
        return (
            self.reference() is tensor
            and self.storage() is tensor.untyped_storage()
            and (self.version is None or self.version == tensor._version)
            and self.shape == tensor.shape
            and self.stride == tensor.stride()
        )


class Plan:
    """What is known of calls over one weight, scale and bias, with the other arguments fixed."""

    __slots__ = (
        "activation_scale",
        "bias",
        "by_rows",
        "call",
        "device",
        "generation",
        "k",
        "scale",
        "scale_fp32",
        "static_fp32",
        "weight",
    )

    def __init__(
        self,
        key: tuple[Any, ...],
        device: torch.device,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        call: LinearCall,
    ) -> None:
        weight, scale, bias, activation_scale = tensors

        def forget(reference: weakref.ref[torch.Tensor]) -> None:
            plan = _plans.get(key)
            held = () if plan is None else (plan.weight, plan.scale, plan.bias)
            if any(one is not None and one.reference is reference for one in held):
                del _plans[key]

        n, self.k = weight.shape
        self.weight = _Held(weight, forget)
        self.scale = _Held(scale, forget)
        self.bias = None if bias is None else _Held(bias, forget, read_anew=True)
        self.activation_scale = None if activation_scale is None else _Held(activation_scale)
        self.scale_fp32 = weight_scale_fp32(scale, call.recipe, n, self.k)
        self.static_fp32 = (
            None if activation_scale is None else activation_scale_fp32(activation_scale)
        )
        self.device = device
        self.call = call
        self.generation = generation.current
        self.by_rows: dict[int, tuple[LinearProblem, Decision, _Linear, _Settled | None]] = {}

    def compute(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation_scale: torch.Tensor | None,
        call: LinearCall,
    ) -> torch.Tensor:
        """The computation itself, as `execute.forward`, once the plan is known to hold."""
        m = x.numel() // self.k
        known = self.by_rows.get(m)
        if known is None:
            out = execute.forward(x, weight, scale, bias, activation_scale, call)
            self.learn(m, weight, bias)
            return out
        problem, decision, linear, settled = known
        decide.counters.calls += 1
        flat = x if x.dim() == 2 else x.reshape(m, self.k)
        try:
            if settled is not None:
                out = settled(flat, weight, bias)
            else:
                operand = Weight(weight, self.scale_fp32, call.recipe, scale)
                out = linear(flat, operand, bias, self.static_fp32, problem)
        except Exception as error:  # noqa: BLE001  # any library's; `put_aside` says whose it is
            self.by_rows.pop(m, None)
            operand = Weight(weight, self.scale_fp32, call.recipe, scale)
            return execute.after_failure(
                error, decision, x, operand, bias, self.static_fp32, problem, call
            )
        return out if flat is x else out.view(*x.shape[:-1], problem.n)

    def learn(self, m: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Keep what was decided for M rows, where that is settled."""
        call = self.call
        problem = describe_call(m, weight, call, bias, self.activation_scale is not None)
        decision = decide.remembered(problem, self.device, call.allowed)
        if decision is not None and m > 0:
            if len(self.by_rows) >= _MAX_ROWS:
                self.by_rows.clear()
            backend = registry.load(decision.backend)
            operand = Weight(weight, self.scale_fp32, call.recipe, self.scale_fp32)
            problem = decision.problem  # with what was decided beside the backend
            settled = backend.settled(operand, self.static_fp32, problem, self.device)
            self.by_rows[m] = problem, decision, backend.linear, settled


_plans: dict[tuple[Any, ...], Plan] = {}


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    block_size: object,
    out_dtype: object,
    backend: object,
) -> torch.Tensor | None:
    """The linear, where a plan is known and still holds; else None. Arguments as the caller's."""
    # Every nanosecond here is paid by every call, so this is one function, the cheapest first.
    if (
        type(x) is not torch.Tensor
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return None
    autocast = autocast_dtype(x) if any_autocast_enabled() else None
    try:
        plan = _plans.get(
            (
                id(weight),
                id(scale),
                id(bias),
                x.dtype,
                autocast,
                policy.in_context(),
                block_size,
                out_dtype,
                backend,
            )
        )
    except TypeError:
        return None  # an argument that cannot be hashed, such as a list of block sizes
    if (
        plan is None
        or plan.generation != generation.current
        or x.device != plan.device
        or x.layout is not torch.strided
        or x.is_nested
        or not plan.weight.is_still(weight)
        or not plan.scale.is_still(scale)
        or (bias is not None and (plan.bias is None or not plan.bias.is_still(bias)))
    ):
        return None
    if activation_scale is None:
        if plan.activation_scale is not None:
            return None
    elif plan.activation_scale is None or not plan.activation_scale.is_still(activation_scale):
        return None
    shape = x.shape
    if not shape or shape[-1] != plan.k:
        return None
    tensors = (x, weight, scale, bias, activation_scale)
    if autocast is not None:
        # Our own casts are all stated; autocast inside would change fp32 sums to 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            return autograd.apply(*tensors, plan.call, plan.compute)
    if torch.is_grad_enabled():
        return autograd.apply(*tensors, plan.call, plan.compute)
    return plan.compute(*tensors, plan.call)


def keep(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    block_size: object,
    out_dtype: object,
    backend: object,
    call: LinearCall,
) -> None:
    """Remember a call that was checked and has run, for the next one like it."""
    if (
        type(x) is not torch.Tensor
        or x.is_meta
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or call.transposed  # views made anew in every call
        or call.scale_transposed
        # What is prepared during capture exists only when the graph is replayed.
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return
    autocast = autocast_dtype(x)
    key = (
        id(weight),
        id(scale),
        id(bias),
        x.dtype,
        autocast,
        policy.in_context(),
        block_size,
        out_dtype,
        backend,
    )
    try:
        hash(key)
    except TypeError:
        return
    tensors = (weight, scale, bias, activation_scale)
    plan = _plans[key] = Plan(key, x.device, tensors, call)
    plan.learn(x.numel() // plan.k, weight, bias)


def count() -> int:
    """How many plans are remembered."""
    return len(_plans)
