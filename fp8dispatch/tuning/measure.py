"""One size: who may run it, who computes it right, and who is the fastest.

A call is timed as eager inference makes it: `fp8_linear` on bf16 activations of normal values, with
dynamic scales, no bias and bf16 out. Before a time is taken the whole output is compared with the
truth, computed in float64 on the device from the same quantised operands, strip by strip, within
the bounds of `fp8dispatch.probes.numerics`; memory that the output will get holds NaN first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

import torch

from fp8dispatch import decide, policy, registry, routes
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.failures import describe_error, is_out_of_memory, is_sticky_cuda_error
from fp8dispatch.linear import fp8_linear
from fp8dispatch.machine import Machine
from fp8dispatch.policy import Policy, Statement
from fp8dispatch.probes.numerics import judge, poison, synchronize
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import quantize_activation
from fp8dispatch.quantization.weight import quantize
from fp8dispatch.recipe import Granularity, Recipe, infer_recipe
from fp8dispatch.router import refusals_of
from fp8dispatch.tuning.shapes import Size
from fp8dispatch.tuning.timing import Call, Timer, Timing, lost_context, rank, time_arms

State = Literal["timed", "wrong", "refused", "failed"]

_FP8 = "float8_e4m3fn"
_SEED = 0xF8
_STRIP_ELEMENTS = 1 << 24  # of the largest float64 matrix that judging makes: 128 MB


@dataclass(frozen=True)
class Arm:
    """One backend and one size.

    Attributes:
        backend: its name.
        state: "timed", "wrong" (its numbers), "refused" (machine, call or trust), or "failed" (it
            raised, or memory ran out).
        reason: why it was not timed; empty where it was.
        us: median microseconds of a call; None where it was not timed.
        spread: of the rounds, as a share of the median.
    """

    backend: str
    state: State
    reason: str = ""
    us: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Point:
    """One size as it was measured.

    Attributes:
        size: M, N and K.
        recipe: the recipe that `fp8_linear` infers from such a scale.
        order: the backends that were timed, the fastest first, ties in the default order.
        before: the one of them that the default order would run.
        arms: every backend that was asked, in the default order.
    """

    size: Size
    recipe: Recipe
    order: tuple[str, ...]
    before: str | None
    arms: tuple[Arm, ...]

    @property
    def wrong(self) -> dict[str, str]:
        """Backend -> what was wrong with its numbers."""
        return {arm.backend: arm.reason for arm in self.arms if arm.state == "wrong"}

    @property
    def us(self) -> dict[str, float]:
        """Backend -> median microseconds, of those that were timed."""
        return {arm.backend: arm.us for arm in self.arms if arm.us is not None}


def measure(
    size: Size,
    recipe: Recipe,
    device: torch.device,
    machine: Machine,
    allowed: Policy,
    timer: Timer,
) -> Point:
    """Check and time every backend that takes a size.

    Args:
        size: M, N and K.
        recipe: what the weight scale means.
        device: where to measure.
        machine: the same device as plain data.
        allowed: `only` and `excluded` say which backends to time, `accuracy` the least exact class.
        timer: microseconds of one call.

    Raises:
        BackendUnavailableError: a backend lost the CUDA context; nothing can be measured after it.
    """
    n, k = size.n, size.k
    meant = infer_recipe((n, k), recipe.scale_shape(n, k), recipe.block_size)
    problem = LinearProblem(size.m, n, k, meant, _FP8, _FP8, "bfloat16", accuracy=allowed.accuracy)
    default, _ = routes.order_for(problem, machine, registry.NAMES)
    asked = [name for name in default if name in (allowed.only or default)]
    asked = [name for name in asked if name not in allowed.excluded]
    refused = {name: _refusal(name, problem, device, machine) for name in asked}
    takers = [name for name in asked if refused[name] is None]
    with _as_inference(device):
        measured = _check_and_time(takers, problem, recipe, device, timer)
    arms = tuple(refused[name] or measured[name] for name in asked)
    timings = {arm.backend: Timing(arm.us, arm.spread or 0.0) for arm in arms if arm.us is not None}
    before = next((name for name in asked if name in timings), None)
    return Point(size, meant, rank(timings, default), before, arms)


def _refusal(
    name: str, problem: LinearProblem, device: torch.device, machine: Machine
) -> Arm | None:
    """Why the router would not choose a backend, whatever its speed; None where it may."""
    backend = registry.load(name)
    # A backend that must be named is never chosen by its speed, so the policy here names none.
    reasons = refusals_of(name, backend, problem, machine, Policy())
    if reasons:
        return Arm(name, "refused", "; ".join(f"{name} {reason}" for reason in reasons))
    standing = decide.standing(name, device, machine, problem.recipe)
    if not standing.usable:
        told = f"{name} needs right numbers on this machine, found {standing.verdict} ones: "
        return Arm(name, "refused", told + standing.reason)
    return None


@contextmanager
def _as_inference(device: torch.device) -> Iterator[None]:
    """Calls mean what a plain eager call means, whatever stands around the tuning."""
    token = policy.enter(Statement(batch_invariant=False, tuned=False))
    try:
        plainly = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), plainly:
            yield
    finally:
        policy.leave(token)


def _check_and_time(
    names: Sequence[str],
    problem: LinearProblem,
    recipe: Recipe,
    device: torch.device,
    timer: Timer,
) -> dict[str, Arm]:
    """An answer for each backend; none of them is timed before all were checked."""
    try:
        operands = _Operands(problem, recipe, device)
        calls = {name: functools.partial(operands.call, name) for name in names}
        with torch.inference_mode():
            arms = _check(calls, operands)
            right = {name: call for name, call in calls.items() if name not in arms}
            timings, errors = time_arms(right, timer)
    except Exception as error:
        if not is_out_of_memory(error):  # of the operands or their truth: nobody's fault
            raise
        return {name: _raised(name, error) for name in names}
    arms |= {name: _raised(name, error) for name, error in errors.items()}
    return arms | {
        name: Arm(name, "timed", "", timing.us, timing.spread) for name, timing in timings.items()
    }


def _check(calls: Mapping[str, Call], operands: _Operands) -> dict[str, Arm]:
    """Run each backend once; those that raise or compute wrong numbers, and what was wrong."""
    arms: dict[str, Arm] = {}
    outs: dict[str, object] = {}
    for name, call in calls.items():
        try:
            poison(operands.problem, operands.x.device)
            outs[name] = call()
            synchronize(operands.x.device)
        except Exception as error:
            if is_sticky_cuda_error(error):
                raise lost_context(name, "checked", error) from error
            arms[name] = _raised(name, error)
            outs.pop(name, None)
            continue
        if not operands.unchanged():
            arms[name] = Arm(name, "wrong", "it changed its operands")
            operands.restore()
            del outs[name]
    for strip in operands.strips():
        for name in [name for name in outs if name not in arms]:
            out = outs[name]
            part = out[:, strip.columns] if _is_matrix(out) else out
            _, problem = judge(part, strip)
            if problem is not None:
                arms[name] = Arm(name, "wrong", f"from column {strip.columns.start} on, {problem}")
    return arms


def _is_matrix(out: object) -> TypeGuard[torch.Tensor]:
    return isinstance(out, torch.Tensor) and out.dim() == 2


def _raised(name: str, error: Exception) -> Arm:
    if isinstance(error, BackendUnavailableError):
        return Arm(name, "refused", str(error))
    memory = "memory ran out: " if is_out_of_memory(error) else ""
    return Arm(name, "failed", memory + describe_error(error))


class _Operands:
    """Tensors of one size on the device, and their truth in float64, a strip at a time."""

    def __init__(self, problem: LinearProblem, recipe: Recipe, device: torch.device) -> None:
        self.problem, self._recipe = problem, recipe
        m, n, k = problem.m, problem.n, problem.k
        generator = torch.Generator(device).manual_seed(_SEED)

        def normal(rows: int) -> torch.Tensor:
            shape = (rows, k)
            return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)

        self.weight, self.scale = quantize(normal(n), recipe)
        self.x = normal(m)
        self._before = [tensor.clone() for tensor in self._inputs()]
        group = recipe.group_size(k)
        plain = quantize_activation(self.x, group, torch.float8_e4m3fn, None, use_kernels=False)
        scale = plain.scale.double().repeat_interleave(group, 1)[:, :k]
        self._wide_x = plain.data.float().double() * scale

    def call(self, backend: str) -> torch.Tensor:
        """The call that is checked and timed."""
        return fp8_linear(
            self.x, self.weight, self.scale, block_size=self._recipe.block_size, backend=backend
        )

    def _inputs(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.weight.view(torch.uint8), self.scale

    def unchanged(self) -> bool:
        return all(map(torch.equal, self._inputs(), self._before))

    def restore(self) -> None:
        for tensor, before in zip(self._inputs(), self._before, strict=True):
            tensor.copy_(before)

    def strips(self) -> Iterator[_Strip]:
        m, n, k = self.problem.m, self.problem.n, self.problem.k
        step = max(1, _STRIP_ELEMENTS // max(m, k))
        for start in range(0, n, step):
            columns = slice(start, min(start + step, n))
            weight = self.weight[columns].float().double() * self._scale_of(columns)
            yield _Strip(
                columns=columns,
                value=self._wide_x @ weight.t(),
                mass=self._wide_x.abs() @ weight.abs().t(),
                largest=self._wide_x.abs().amax(1, keepdim=True) * weight.abs().amax(1),
                x=self.x,
                problem=replace(self.problem, n=columns.stop - columns.start),
            )

    def _scale_of(self, rows: slice) -> torch.Tensor:
        """The weight's scales for some of its rows, as float64 that spreads to [rows, K]."""
        scale = self.scale.double()
        if self._recipe.block_size is None:
            whole = self._recipe.granularity is Granularity.TENSOR
            return scale.reshape(1, 1) if whole else scale[rows]
        block_n, block_k = self._recipe.block_size
        index = torch.arange(rows.start, rows.stop, device=scale.device) // block_n
        return scale[index].repeat_interleave(block_k, 1)[:, : self.problem.k]


@dataclass
class _Strip:
    """Some columns of the truth, as `judge` wants it."""

    columns: slice
    value: torch.Tensor
    mass: torch.Tensor
    largest: torch.Tensor
    x: torch.Tensor
    problem: LinearProblem
    own_quantiser: bool = True  # `fp8_linear` lets each backend quantise as it does

    def unchanged(self) -> bool:
        """Asked, and the operands restored, before any strip is judged."""
        return True
