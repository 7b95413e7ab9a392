"""Chooses a backend for a problem, and keeps what every backend answered.

The router sees plain data and asks two questions of each backend: does it run on this machine, does
it take this call. Whoever refuses nothing must also be trusted: `judge` tells whether it has
computed right numbers here, and is asked only of the backend about to be chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.policy import Policy
from fp8dispatch.problem import LinearProblem


class Candidate(Protocol):
    """What the router asks of a backend."""

    @property
    def opt_in(self) -> str:
        """Why it runs only where the policy names it; empty where it needs no naming."""
        ...

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        """Why the backend cannot run on this machine at all; empty when it can."""
        ...

    def refuse_problem(self, problem: LinearProblem, machine: Machine) -> tuple[Refusal, ...]:
        """Why the backend does not take this call; empty when it does."""
        ...


@dataclass(frozen=True)
class Standing:
    """What is known of a backend's numbers on this machine.

    Attributes:
        verdict: "right", "wrong", "untested" or "not needed" (plain torch).
        reason: how that is known.
        usable: whether the router may choose it.
    """

    verdict: str
    reason: str
    usable: bool


@dataclass(frozen=True)
class Assessment:
    """What one backend answered.

    Attributes:
        backend: its name.
        refusals: every reason why it does not run the call; empty when it could.
        standing: its numbers here; None where nobody asked.
    """

    backend: str
    refusals: tuple[Refusal, ...] = ()
    standing: Standing | None = None


@dataclass(frozen=True)
class Decision:
    """Which backend runs a problem, and what every backend answered.

    Attributes:
        backend: name of the chosen backend.
        problem: the call, as plain data.
        machine: the machine it was decided for.
        decided_by: "default", "argument backend=", "use_backend" and the like.
        route: where the order of backends comes from.
        assessments: one for each backend in that order, the chosen one among them.
        gradient: how dX is computed, in a few words; None where nobody asked.
        dgrad: the decision for dX where it is an FP8 GEMM.
    """

    backend: str
    problem: LinearProblem
    machine: Machine
    decided_by: str
    route: str
    assessments: tuple[Assessment, ...]
    gradient: str | None = None
    dgrad: Decision | None = None

    @property
    def refusals(self) -> tuple[tuple[str, tuple[Refusal, ...]], ...]:
        """Backend name -> all its refusals, for those that refuse."""
        return tuple((one.backend, one.refusals) for one in self.assessments if one.refusals)

    @property
    def others(self) -> tuple[str, ...]:
        """The backends that would take the call as well, in order."""
        return tuple(
            one.backend
            for one in self.assessments
            if not one.refusals and one.backend != self.backend
        )

    @property
    def standing(self) -> Standing | None:
        """What is known of the chosen backend's numbers."""
        return next(one.standing for one in self.assessments if one.backend == self.backend)

    def as_dict(self) -> dict[str, Any]:
        """Plain data as JSON knows it: dictionaries, lists, texts and numbers."""
        kept: dict[str, Any] = json.loads(self.as_json())
        return kept

    def as_json(self) -> str:
        """The whole decision as indented JSON; each refusal also as a sentence."""
        return json.dumps(self._plain(), indent=1)

    def _plain(self) -> dict[str, Any]:
        machine = asdict(replace(self.machine, versions={}))
        assessments = [
            {
                "backend": one.backend,
                "refusals": [
                    {**asdict(reason), "sentence": f"{one.backend} {reason}"}
                    for reason in one.refusals
                ],
                "standing": None if one.standing is None else asdict(one.standing),
            }
            for one in self.assessments
        ]
        return {
            "backend": self.backend,
            "problem": asdict(self.problem),
            "machine": {**machine, "versions": dict(self.machine.versions)},
            "decided_by": self.decided_by,
            "route": self.route,
            "assessments": assessments,
            "gradient": self.gradient,
            "dgrad": None if self.dgrad is None else self.dgrad._plain(),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.backend} runs {self.problem} on {self.machine} ({self.decided_by})",
            f"  order: {self.route}",
        ]
        if self.problem.tile is not None:
            lines.append(f"  tile: {self.problem.tile}")
        if self.standing is not None:
            lines.append(f"  numbers: {self.standing.verdict}, {self.standing.reason}")
        lines += [f"  {line}" for line in _render(self.refusals)]
        if self.others:
            lines.append(f"  would run it too: {', '.join(self.others)}")
        if self.gradient is not None:
            lines.append(f"  dX: {self.gradient}")
        if self.dgrad is not None:
            lines += [f"    {line}" for line in str(self.dgrad).splitlines()]
        return "\n".join(lines)


def select(
    problem: LinearProblem,
    machine: Machine,
    policy: Policy,
    names: tuple[str, ...],
    load: Callable[[str], Candidate],
    judge: Callable[[str], Standing] | None = None,
    route: str = "registration",
) -> Decision:
    """The first backend in the policy's order that refuses nothing and computes right numbers.

    Args:
        names: every known backend in the default order.
        load: gives the backend of a name.
        judge: tells what is known of a backend's numbers here; None trusts all.
        route: where `names` comes from, for explanations.

    Raises:
        BackendUnavailableError: none is left; the message holds every refusal.
    """
    chosen: str | None = None
    assessments: list[Assessment] = []
    for name in policy.order(names):
        reasons = refusals_of(name, load(name), problem, machine, policy)
        standing = None
        if not reasons and chosen is None and judge is not None:
            standing = judge(name)
            if not standing.usable:
                found = f"{standing.verdict} ones: {standing.reason}"
                reasons = (Refusal("numbers", "right numbers on this machine", found),)
        if not reasons and chosen is None:
            chosen = name
        assessments.append(Assessment(name, reasons, standing))
    if chosen is None:
        refused = tuple((one.backend, one.refusals) for one in assessments)
        told = "; ".join(_render(refused)) or "every backend is excluded"
        raise BackendUnavailableError(
            f"no backend allowed by {policy.source} takes {problem} on {machine}: {told}"
        )
    stated = f"as stated by {policy.source}" if policy.only else route
    return Decision(chosen, problem, machine, policy.source, stated, tuple(assessments))


def refusals_of(
    name: str, backend: Candidate, problem: LinearProblem, machine: Machine, policy: Policy
) -> tuple[Refusal, ...]:
    """Every reason why a backend does not run a call, its numbers here apart."""
    # A machine that cannot run the backend makes its demands on the call meaningless.
    reasons = backend.refuse_machine(machine) or backend.refuse_problem(problem, machine)
    return (*refuse_unnamed(name, backend, policy), *reasons)


def refuse_unnamed(name: str, backend: Candidate, policy: Policy) -> tuple[Refusal, ...]:
    """The refusal of a backend that must be asked for by name and was not; else empty."""
    if not backend.opt_in or name in policy.only:
        return ()
    need = f'to be named (backend="{name}"), since {backend.opt_in}'
    return (Refusal("opt-in", need, "a call that does not name it"),)


def _render(refusals: tuple[tuple[str, tuple[Refusal, ...]], ...]) -> list[str]:
    return [f"{name} {reason}" for name, reasons in refusals for reason in reasons]
