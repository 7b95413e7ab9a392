"""Decides, once for each kind of call, and remembers; puts a backend aside that fails at run time.

A decision asks the router, in the order of the routes, and trusts a backend only after it has
computed right numbers on this device (`trust`). A backend that raises in automatic mode is
quarantined for this process, said once in a warning, and the next one takes the call; running out
of memory is nobody's fault and is raised as it is, and a forced backend's error is the caller's.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from fp8dispatch import generation, registry, routes, trust
from fp8dispatch.errors import BackendUnavailableError, FP8DispatchError
from fp8dispatch.failures import is_out_of_memory, is_sticky_cuda_error
from fp8dispatch.machine import Machine
from fp8dispatch.policy import Policy
from fp8dispatch.probes.device import describe
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import Recipe
from fp8dispatch.router import Decision, Standing, select
from fp8dispatch.routes import TunedRoute
from fp8dispatch.tuning import orders

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("fp8dispatch")


@dataclass
class Counters:
    """What happened in this process; see `stats`."""

    calls: int = 0
    cold_decisions: int = 0
    cold_in_capture: int = 0
    fallbacks: int = 0
    chosen: dict[str, int] = field(default_factory=dict)


counters = Counters()

_decisions: dict[tuple[LinearProblem, torch.device, Policy], Decision] = {}
# M changes from call to call; a bound keeps a long-running server's memory flat.
_MAX_DECISIONS = 4096
_announced: set[tuple[str, str, str]] = set()


def decide(problem: LinearProblem, device: torch.device, allowed: Policy) -> Decision:
    """The decision for a call, remembered.

    Raises:
        BackendUnavailableError: every allowed backend refused; the message holds each reason.
    """
    key = (problem, device, allowed)
    decision = _decisions.get(key)
    if decision is not None:
        return decision
    import torch  # the caller, who has a tensor, has done so: the doctor asks `standing` alone

    machine = describe(device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    tuned = orders.find(problem, machine) if allowed.tuned else None
    order, route = routes.order_for(problem, machine, registry.NAMES, tuned)
    decision = select(
        problem,
        machine,
        allowed,
        order,
        lambda name: registry.find(problem.family + name),
        lambda name: (
            found_wrong(name, tuned)
            or standing(problem.family + name, device, machine, problem.recipe, capturing=capturing)
        ),
        route,
    )
    decision = with_tile(decision, allowed, tuned)
    counters.cold_decisions += 1
    counters.chosen[decision.backend] = counters.chosen.get(decision.backend, 0) + 1
    if capturing:
        counters.cold_in_capture += 1
        _log.warning(
            "a call was captured into a CUDA graph before it was ever run, and took %s, which is "
            "known to be safe; run the model once, or fp8dispatch.warmup, before capturing",
            decision.backend,
        )
        return decision  # a decision taken without asking everybody is not kept
    _announce(decision)
    asked = [one.standing for one in decision.assessments if one.standing is not None]
    if any(one.verdict == "untested" for one in asked):
        return decision  # it will be tested again, and the decision may then be another
    if len(_decisions) >= _MAX_DECISIONS:
        _decisions.clear()
    _decisions[key] = decision
    return decision


def remembered(problem: LinearProblem, device: torch.device, allowed: Policy) -> Decision | None:
    """The decision for a call where it is settled; None where it would be taken again."""
    return _decisions.get((problem, device, allowed))


def standing(
    name: str,
    device: torch.device | str,
    machine: Machine,
    recipe: Recipe,
    *,
    capturing: bool = False,
) -> Standing:
    """What is known of a backend's numbers on a device, finding out where it may.

    Where a graph is being captured nothing is found out, and nothing is imported.

    Args:
        name: as `registry.find` takes it.
    """
    held = trust.quarantined(name, device, recipe)
    if held is not None:
        return Standing("quarantined", held, usable=False)
    if (
        name.removeprefix(registry.EXPERTS) == "triton"
        and machine.triton_interpreter
        and machine.device_type != "cuda"
    ):
        return Standing("not needed", "the kernels run in Triton's interpreter", usable=True)
    backend = registry.find(name)
    reasons = () if capturing else backend.loadable(recipe)
    if reasons:
        told = "; ".join(str(reason) for reason in reasons)
        return Standing("not loadable", f"it {told}", usable=False)
    verdict = trust.judge(name, backend, device, machine, recipe, may_probe=not capturing)
    usable = verdict.state in ("right", "not needed")
    if verdict.state == "untested" and not capturing:
        # Could not be tested, for lack of memory say: no reason to distrust what is known to run
        # on this kind of machine, nor to trust anything else.
        usable = backend.is_verified(machine)
    return Standing(verdict.state, verdict.reason, usable)


def found_wrong(name: str, tuned: TunedRoute | None) -> Standing | None:
    """The standing of a backend whose numbers were wrong while this size was tuned; else None."""
    reason = None if tuned is None else tuned.wrong.get(name)
    return None if reason is None else Standing("wrong", f"tuning found {reason}", usable=False)


def with_tile(decision: Decision, allowed: Policy, tuned: TunedRoute | None) -> Decision:
    """The decision with the tile that was stated or tuned for its backend, if there is one.

    A batch-invariant call keeps the backend's own choice, and so do experts: both are never tuned.
    """
    tile = allowed.tile or (None if tuned is None else tuned.tiles.get(decision.backend))
    problem = decision.problem
    if tile is None or problem.batch_invariant or problem.family:
        return decision
    return replace(decision, problem=replace(problem, tile=tile))


def put_aside(
    error: Exception, decision: Decision, device: torch.device, allowed: Policy
) -> Policy:
    """Make way for the next backend after one that raised.

    A refusal that could only be found while running excludes the backend from this call; any other
    failure quarantines it for its recipe and device.

    Returns:
        The policy to decide the call with again.

    Raises:
        Exception: `error` itself where the caller has to deal with it: our own errors, out of
            memory, a forced backend.
        BackendUnavailableError: the CUDA context is lost, and no backend can run any more.
    """
    if is_out_of_memory(error):
        raise error
    reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if is_sticky_cuda_error(error):
        raise BackendUnavailableError(
            f"{decision.backend} failed on {decision.problem} and the CUDA context is lost "
            f"({reason}); restart the process and exclude the backend with "
            f"FP8DISPATCH_BACKEND=-{decision.backend}"
        ) from error
    if allowed.forced:
        raise error
    counters.fallbacks += 1
    if isinstance(error, BackendUnavailableError):
        _log.info("%s steps back from %s: %s", decision.backend, decision.problem, error)
        return replace(allowed, excluded=(*allowed.excluded, decision.backend))
    if isinstance(error, FP8DispatchError):
        raise error
    name = decision.problem.family + decision.backend
    trust.quarantine(name, device, decision.problem.recipe, reason)
    forget()
    warnings.warn(
        f"the backend {decision.backend} failed on {decision.problem} and is put aside for "
        f"{decision.problem.recipe} on {device} in this process ({reason})",
        RuntimeWarning,
        stacklevel=2,
    )
    return allowed


def stats() -> dict[str, object]:
    """Counts of this process: calls, cold decisions, those during capture, fallbacks, choices.

    Returns:
        Plain data: ``calls``, ``cold_decisions``, ``cold_in_capture``, ``fallbacks``, and
        ``chosen``, the cold decisions by backend.
    """
    return asdict(counters)


def forget() -> None:
    """Drop every remembered decision, as a change of trust or of the registry asks for."""
    _decisions.clear()
    generation.renew()


def _announce(decision: Decision) -> None:
    """Say each first choice of a backend for a recipe on a machine once."""
    what = (decision.backend, str(decision.problem.recipe), str(decision.machine))
    if what not in _announced:
        _announced.add(what)
        _log.info("%s", decision)
