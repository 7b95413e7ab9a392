"""One size: who may run it, who computes it right, and who is the fastest.

A call is timed as eager inference makes it: `fp8_linear` on bf16 activations of normal values, with
dynamic scales, no bias and bf16 out. Before a time is taken the whole output is compared with the
truth, computed in float64 on the device from the same quantised operands, strip by strip, within
the bounds of `fp8dispatch.probes.numerics`; memory that the output will get holds NaN first.

A backend that offers other tiles than its own choice (`Backend.tiles`) is timed with each of them,
which must have given the same bits. It keeps its own choice unless another is faster by more than
the noise.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeGuard

import torch

from fp8dispatch import decide, policy, registry, routes
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.failures import describe_error, is_out_of_memory, is_sticky_cuda_error
from fp8dispatch.kernels.tile import Tile
from fp8dispatch.linear import fp8_linear
from fp8dispatch.machine import Machine
from fp8dispatch.policy import Policy, Statement
from fp8dispatch.probes.numerics import judge, poison, synchronize
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import Recipe, infer_recipe
from fp8dispatch.router import refusals_of
from fp8dispatch.tuning.operands import Operands
from fp8dispatch.tuning.shapes import Size
from fp8dispatch.tuning.timing import Call, Timer, Timing, lost_context, rank, time_arms

State = Literal["timed", "wrong", "refused", "failed"]

_FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class Arm:
    """One backend, with one of its tiles, and one size.

    Attributes:
        backend: its name.
        state: "timed", "wrong" (its numbers), "refused" (machine, call or trust; a tile that gives
            other bits), or "failed" (it raised, or memory ran out).
        reason: why it was not timed; empty where it was.
        us: median microseconds of a call; None where it was not timed.
        spread: of the rounds, as a share of the median.
        tile: what it ran with in place of its own choice; None for that.
    """

    backend: str
    state: State
    reason: str = ""
    us: float | None = None
    spread: float | None = None
    tile: Tile | None = None

    @property
    def name(self) -> str:
        """The backend and, where it is not its own choice, the tile."""
        return named(self.backend, self.tile)


@dataclass(frozen=True)
class Point:
    """One size as it was measured.

    Attributes:
        size: M, N and K.
        recipe: the recipe that `fp8_linear` infers from such a scale.
        order: the backends that were timed, the fastest first, ties in the default order.
        before: the one of them that the default order would run.
        arms: every backend that was asked, in the default order, and its tiles behind it.
        tiles: backend -> the tile that it was the fastest with, where that is not its own choice.
    """

    size: Size
    recipe: Recipe
    order: tuple[str, ...]
    before: str | None
    arms: tuple[Arm, ...]
    tiles: Mapping[str, Tile] = field(default_factory=dict)

    @property
    def wrong(self) -> dict[str, str]:
        """Backend -> what was wrong with its numbers; of tiles the arms tell."""
        return {arm.backend: arm.reason for arm in self._own if arm.state == "wrong"}

    @property
    def us(self) -> dict[str, float]:
        """Backend -> median microseconds, of those that were timed, with the tile in `tiles`."""
        return {
            arm.backend: arm.us
            for arm in self.arms
            if arm.us is not None and arm.tile == self.tiles.get(arm.backend)
        }

    @property
    def us_before(self) -> float | None:
        """Median microseconds of `before` with the tile of its own choice."""
        return next((arm.us for arm in self._own if arm.backend == self.before), None)

    @property
    def _own(self) -> Iterator[Arm]:
        return (arm for arm in self.arms if arm.tile is None)


def named(backend: str, tile: Tile | None) -> str:
    """A backend with a tile as it is printed."""
    return backend if tile is None else f"{backend} {tile}"


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
    arms: list[Arm] = []
    timings: dict[str, Timing] = {}
    tiles: dict[str, Tile] = {}
    for name in asked:
        found = measured.get(name) or (refused[name],)
        arms += [arm for arm in found if arm is not None]
        best = _fastest_tile(arms, name)
        if best is not None:
            timings[name] = _timing(best)
            tiles |= {} if best.tile is None else {name: best.tile}
    before = next((name for name in asked if name in timings), None)
    return Point(size, meant, rank(timings, default), before, tuple(arms), tiles)


def _fastest_tile(arms: Sequence[Arm], backend: str) -> Arm | None:
    """The arm of a backend that counts; None where its own choice was not timed."""
    timed = {arm.name: arm for arm in arms if arm.backend == backend and arm.us is not None}
    if backend not in timed:
        return None
    return timed[rank({name: _timing(arm) for name, arm in timed.items()}, tuple(timed))[0]]


def _timing(arm: Arm) -> Timing:
    return Timing(arm.us or 0.0, arm.spread or 0.0)


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


@dataclass(frozen=True)
class _Contender:
    """A backend with one of its tiles; None for its own choice."""

    backend: str
    tile: Tile | None = None

    @property
    def name(self) -> str:
        return named(self.backend, self.tile)

    def arm(self, state: State, reason: str = "") -> Arm:
        return Arm(self.backend, state, reason, tile=self.tile)

    def raised(self, error: Exception) -> Arm:
        if isinstance(error, BackendUnavailableError):
            return self.arm("refused", str(error))
        memory = "memory ran out: " if is_out_of_memory(error) else ""
        return self.arm("failed", memory + describe_error(error))


def _check_and_time(
    backends: Sequence[str],
    problem: LinearProblem,
    recipe: Recipe,
    device: torch.device,
    timer: Timer,
) -> dict[str, tuple[Arm, ...]]:
    """For each backend an answer for its own choice, and for its other tiles where that is right.

    Nobody is timed before all were checked.
    """
    offered = {name: (None, *registry.load(name).tiles(problem, device)) for name in backends}
    contenders = [_Contender(name, tile) for name, tiles in offered.items() for tile in tiles]
    try:
        operands = Operands(problem, recipe, device)
        calls = {one: _call(one, operands) for one in contenders}
        with torch.inference_mode():
            arms = _check(calls, operands)
            right = {one.name: call for one, call in calls.items() if one not in arms}
            timings, errors = time_arms(right, timer)
    except Exception as error:
        if not is_out_of_memory(error):  # of the operands or their truth: nobody's fault
            raise
        return {name: (_Contender(name).raised(error),) for name in backends}
    for one in contenders:
        if one.name in errors:
            arms[one] = one.raised(errors[one.name])
        elif one.name in timings:
            took = timings[one.name]
            arms[one] = Arm(one.backend, "timed", "", took.us, took.spread, one.tile)
    return {
        name: tuple(arms[one] for one in contenders if one.backend == name and one in arms)
        for name in backends
    }


def _call(one: _Contender, operands: Operands) -> Call:
    """The call that is checked and timed; a context of its own states the tile beforehand."""
    context = contextvars.copy_context()
    context.run(policy.enter, Statement(tile=one.tile))
    linear = functools.partial(fp8_linear, block_size=operands.block_size, backend=one.backend)
    return functools.partial(context.run, linear, operands.x, operands.weight, operands.scale)


def _check(calls: dict[_Contender, Call], operands: Operands) -> dict[_Contender, Arm]:
    """Run each contender once; those that raise or compute wrong numbers, and what was wrong.

    The tiles of a backend whose own choice is in the answer are dropped from `calls`. A tile that
    gives the same bits as its backend's own choice is as right as that; of others the truth says
    whether they are wrong, and right ones are not taken either, since no bit may hang on a tile.
    """
    arms: dict[_Contender, Arm] = {}
    outs: dict[_Contender, object] = {}
    for one, call in calls.items():
        try:
            poison(operands.problem, operands.x.device)
            out = call()
            synchronize(operands.x.device)
        except Exception as error:
            if is_sticky_cuda_error(error):
                raise lost_context(one.name, "checked", error) from error
            arms[one] = one.raised(error)
            continue
        if not operands.unchanged():
            arms[one] = one.arm("wrong", "it changed its operands")
            operands.restore()
        elif one.tile is None or not _same_bits(out, outs.get(_Contender(one.backend))):
            outs[one] = out
    for strip in operands.strips():
        for one in [one for one in outs if one not in arms]:
            out = outs[one]
            part = out[:, strip.columns] if _is_matrix(out) else out
            _, problem = judge(part, strip)
            if problem is not None:
                arms[one] = one.arm("wrong", f"from column {strip.columns.start} on, {problem}")
    for one in [one for one in calls if one.tile is not None]:
        if _Contender(one.backend) in arms:
            del calls[one]
            arms.pop(one, None)
        elif one in outs and one not in arms:
            reason = f"{one.name} needs the bits of {one.backend}'s own choice, found others"
            arms[one] = one.arm("refused", reason)
    return arms


def _same_bits(out: object, expected: object) -> bool:
    if not _is_matrix(out) or not _is_matrix(expected) or out.shape != expected.shape:
        return False
    return torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


def _is_matrix(out: object) -> TypeGuard[torch.Tensor]:
    return isinstance(out, torch.Tensor) and out.dim() == 2
