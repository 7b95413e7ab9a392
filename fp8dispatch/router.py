"""Chooses a backend for a problem and keeps every refusal, so that the choice explains itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.policy import Policy
from fp8dispatch.problem import LinearProblem


class Candidate(Protocol):
    """The two questions that the router asks of a backend."""

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        """Why the backend cannot run on this machine at all; empty when it can."""
        ...

    def refuse_problem(self, problem: LinearProblem, machine: Machine) -> tuple[Refusal, ...]:
        """Why the backend does not take this call; empty when it does."""
        ...


@dataclass(frozen=True)
class Decision:
    """Which backend runs a problem, and why each other one that was asked does not.

    Attributes:
        backend: name of the chosen backend.
        problem: the call, as plain data.
        machine: the machine it was decided for.
        decided_by: "default", "argument backend=" or the name of an environment variable.
        refusals: backend name -> all its refusals, for those tried before the chosen one.
        not_tried: names after the chosen one in the order.
    """

    backend: str
    problem: LinearProblem
    machine: Machine
    decided_by: str
    refusals: tuple[tuple[str, tuple[Refusal, ...]], ...]
    not_tried: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.backend} runs {self.problem} on {self.machine} ({self.decided_by})"]
        lines += [f"  {line}" for line in _render(self.refusals)]
        if self.not_tried:
            lines.append(f"  not needed: {', '.join(self.not_tried)}")
        return "\n".join(lines)


def select(
    problem: LinearProblem,
    machine: Machine,
    policy: Policy,
    names: tuple[str, ...],
    load: Callable[[str], Candidate],
) -> Decision:
    """The first backend in the policy's order that refuses neither machine nor problem.

    Args:
        names: every known backend in the default order.
        load: gives the backend of a name.

    Raises:
        BackendUnavailableError: none is left; the message holds every refusal.
    """
    order = policy.order(names)
    refusals: list[tuple[str, tuple[Refusal, ...]]] = []
    for position, name in enumerate(order):
        backend = load(name)
        # A machine that cannot run the backend makes its demands on the call meaningless.
        reasons = backend.refuse_machine(machine) or backend.refuse_problem(problem, machine)
        if not reasons:
            return Decision(
                name, problem, machine, policy.source, tuple(refusals), order[position + 1 :]
            )
        refusals.append((name, reasons))
    told = "; ".join(_render(tuple(refusals))) or "every backend is excluded"
    raise BackendUnavailableError(
        f"no backend allowed by {policy.source} takes {problem} on {machine}: {told}"
    )


def _render(refusals: tuple[tuple[str, tuple[Refusal, ...]], ...]) -> list[str]:
    return [f"{name} {reason}" for name, reasons in refusals for reason in reasons]
