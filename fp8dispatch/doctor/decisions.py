"""What each backend says on a device, which one a call would get, and why.

The same router, routes and trust as in a real call. Imports torch, as the backends do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from fp8dispatch import decide, registry, routes
from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.library import LibraryBackend
from fp8dispatch.doctor.devices import Device
from fp8dispatch.doctor.report import (
    AssessmentRecord,
    BackendRecord,
    CallRecord,
    ChoiceRecord,
    RecipeRecord,
    RefusalRecord,
)
from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.policy import Policy
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe, infer_recipe
from fp8dispatch.router import (
    Assessment,
    Decision,
    Standing,
    refusals_of,
    refuse_unnamed,
    select,
)

RECIPES = (
    TENSOR,
    ROW,
    BLOCK_128,
    Recipe(Granularity.BLOCK, (1, 128)),
    Recipe(Granularity.BLOCK, (1, 32)),
)
ROWS = (1, 16, 256, 4096)
SHAPES = ((4096, 7168), (4100, 7000))
"""N and K of the route table: one that every kernel likes, and one that is ragged."""

_SIMULATED = "a simulated machine: nothing can be tested on it from here"
_NOT_YET = "no verdict is stored: --probe tests it now, else its first call does"


class _Asked:
    """A backend as the router asks it, whatever it raises.

    Where its library may be loaded, failing to load is a refusal like any other.
    """

    def __init__(self, name: str, *, may_load: bool) -> None:
        self._may_load = may_load
        self._broken: Refusal | None = None
        try:
            self._backend: Backend | None = registry.load(name)
        except Exception as error:  # noqa: BLE001  # its error is its refusal, others go on
            self._backend = None
            self._broken = _failure("import", f"the module of {name} to load", error)

    @property
    def opt_in(self) -> str:
        return "" if self._backend is None else self._backend.opt_in

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        if self._backend is None or self._broken is not None:
            return () if self._broken is None else (self._broken,)
        try:
            return self._backend.refuse_machine(machine)
        except Exception as error:  # noqa: BLE001  # a plugin may raise anything
            self._broken = _failure("plugin", "a backend that answers without raising", error)
            return (self._broken,)

    def refuse_problem(self, problem: LinearProblem, machine: Machine) -> tuple[Refusal, ...]:
        assert self._backend is not None  # else the machine was refused
        try:
            reasons = self._backend.refuse_problem(problem, machine)
            if not reasons and self._may_load and isinstance(self._backend, LibraryBackend):
                reasons = self._backend.loadable(problem.recipe)
        except Exception as error:  # noqa: BLE001  # a plugin may raise anything
            reasons = (_failure("plugin", "a backend that answers without raising", error),)
        return reasons


@dataclass(frozen=True)
class Examination:
    """What is asked about one device, each question once.

    Attributes:
        device: the device.
        allowed: the policy in force.
        probe: verdicts may be found out; otherwise memory and disk are asked alone.
        on_step: told what is about to be tested.
    """

    device: Device
    allowed: Policy
    probe: bool = False
    on_step: Callable[[str], None] = lambda _: None

    def backends(self) -> tuple[BackendRecord, ...]:
        """Every backend's verdict on this device."""
        return tuple(self._backend(name) for name in registry.NAMES)

    def routes(self) -> tuple[ChoiceRecord, ...]:
        """The route table."""
        return tuple(
            self._choose(problem)[0] for recipe in RECIPES for problem in self._problems(recipe)
        )

    def call(self, m: int, n: int, k: int, recipe: Recipe) -> CallRecord:
        """One call; its recipe is what `fp8_linear` would infer from such a scale."""
        meant = infer_recipe((n, k), recipe.scale_shape(n, k), recipe.block_size)
        choice, decision = self._choose(self._problem(m, n, k, meant))
        if decision is None:
            return CallRecord(
                choice=choice, assessments=choice.passed_over, text=choice.error or ""
            )
        assessments = tuple(_assessment(one) for one in decision.assessments)
        return CallRecord(choice=choice, assessments=assessments, text=str(decision))

    def _problem(self, m: int, n: int, k: int, recipe: Recipe) -> LinearProblem:
        fp8 = "float8_e4m3fn"
        accuracy = self.allowed.accuracy
        return LinearProblem(m, n, k, recipe, fp8, fp8, "bfloat16", accuracy=accuracy)

    def _problems(self, recipe: Recipe) -> Iterator[LinearProblem]:
        for n, k in SHAPES:
            for m in ROWS:
                yield self._problem(m, n, k, recipe)

    @functools.cached_property
    def _standings(self) -> dict[tuple[str, Recipe], Standing]:
        return {}

    @functools.cached_property
    def _candidates(self) -> dict[str, _Asked]:
        may_load = self.probe and not self.device.simulated
        return {name: _Asked(name, may_load=may_load) for name in registry.NAMES}

    def _standing(self, name: str, recipe: Recipe) -> Standing:
        known = self._standings.get((name, recipe))
        if known is None:
            known = self._standings[name, recipe] = self._find_standing(name, recipe)
        return known

    def _find_standing(self, name: str, recipe: Recipe) -> Standing:
        if self.device.simulated:
            if name == "eager":
                return Standing("not needed", "plain torch defines the numbers", usable=True)
            return Standing("untested", _SIMULATED, usable=True)
        device, machine = torch.device(self.device.name), self.device.machine
        if self.probe:
            self.on_step(f"testing {name}, {recipe}, on {self.device.name}")
            return decide.standing(name, device, machine, recipe)
        # As while a graph is captured: nothing is found out. But what is merely untested is not
        # out of the running here, since the first call would test it.
        known = decide.standing(name, device, machine, recipe, capturing=True)
        if known.verdict != "untested":
            return known
        return replace(known, reason=_NOT_YET, usable=True)

    def _backend(self, name: str) -> BackendRecord:
        asked = self._candidates[name]
        reasons = refuse_unnamed(name, asked, self.allowed)  # tested only where it is named
        reasons += asked.refuse_machine(self.device.machine)
        if reasons:
            return BackendRecord(name=name, refusals=_refusals(name, reasons))
        recipes = tuple(self._recipe(name, asked, recipe) for recipe in RECIPES)
        return BackendRecord(name=name, refusals=(), recipes=recipes)

    def _recipe(self, name: str, asked: _Asked, recipe: Recipe) -> RecipeRecord:
        answers = [
            asked.refuse_problem(problem, self.device.machine) for problem in self._problems(recipe)
        ]
        if all(answers):
            # Of the first, which is aligned: what it refuses is the recipe.
            return RecipeRecord(
                recipe=str(recipe),
                verdict="refused",
                reason=f"{name} does not take it",
                refusals=_refusals(name, answers[0]),
            )
        standing = self._standing(name, recipe)
        return RecipeRecord(recipe=str(recipe), verdict=standing.verdict, reason=standing.reason)

    def _choose(self, problem: LinearProblem) -> tuple[ChoiceRecord, Decision | None]:
        order, route = routes.order_for(problem, self.device.machine, registry.NAMES)
        chosen = ChoiceRecord(
            recipe=str(problem.recipe),
            m=problem.m,
            n=problem.n,
            k=problem.k,
            backend=None,
            decided_by=self.allowed.source,
            route=route,
            numbers="",
            passed_over=(),
        )
        try:
            decision = select(
                problem,
                self.device.machine,
                self.allowed,
                order,
                self._candidates.__getitem__,
                lambda name: self._standing(name, problem.recipe),
                route,
            )
        except BackendUnavailableError as error:
            passed_over = tuple(self._refused(problem, name) for name in self.allowed.order(order))
            return chosen.model_copy(update={"error": str(error), "passed_over": passed_over}), None
        before = [one.backend for one in decision.assessments].index(decision.backend)
        answers = {
            "backend": decision.backend,
            "decided_by": decision.decided_by,
            "route": decision.route,
            "numbers": "" if decision.standing is None else decision.standing.verdict,
            "passed_over": tuple(_assessment(one) for one in decision.assessments[:before]),
            "also": decision.others,
        }
        return chosen.model_copy(update=answers), decision

    def _refused(self, problem: LinearProblem, name: str) -> AssessmentRecord:
        """Why one backend does not run a call that none of them runs, as the router has it."""
        asked = self._candidates[name]
        reasons = refusals_of(name, asked, problem, self.device.machine, self.allowed)
        if not reasons:
            standing = self._standing(name, problem.recipe)
            found = f"{standing.verdict} ones: {standing.reason}"
            reasons = (Refusal("numbers", "right numbers on this machine", found),)
        return AssessmentRecord(backend=name, refusals=_refusals(name, reasons))


def _failure(code: str, need: str, error: Exception) -> Refusal:
    first = (str(error).strip() or "no message").splitlines()[0]
    return Refusal(code, need, f"{type(error).__name__}: {first}")


def _refusals(name: str, reasons: tuple[Refusal, ...]) -> tuple[RefusalRecord, ...]:
    return tuple(
        RefusalRecord(
            code=reason.code, need=reason.need, found=reason.found, sentence=f"{name} {reason}"
        )
        for reason in reasons
    )


def _assessment(one: Assessment) -> AssessmentRecord:
    return AssessmentRecord(backend=one.backend, refusals=_refusals(one.backend, one.refusals))
