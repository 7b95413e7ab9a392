"""What each backend says on a device, which one a call would get, and why.

The same router, routes and trust as in a real call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from fp8dispatch import decide, registry, routes
from fp8dispatch.backends.contract import Capability
from fp8dispatch.backends.library import LibraryBackend
from fp8dispatch.doctor.devices import Device
from fp8dispatch.doctor.questions import (
    RECIPES,
    Call,
    expert_problems,
    linear_problems,
    problem_of,
)
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
from fp8dispatch.moe.backends.contract import ExpertBackend
from fp8dispatch.policy import Policy
from fp8dispatch.problem import ExpertsProblem, LinearProblem
from fp8dispatch.recipe import Recipe
from fp8dispatch.router import (
    Assessment,
    Decision,
    Standing,
    refusals_of,
    refuse_unnamed,
    select,
)
from fp8dispatch.routes import TunedRoute
from fp8dispatch.tuning import orders

_SIMULATED = "a simulated machine: nothing can be tested on it from here"
_NOT_YET = "no verdict is stored: --probe tests it now, else its first call does"


class _Asked:
    """A backend as the router asks it, by the name that `registry.find` takes, whatever it raises.

    Where its library may be loaded, failing to load is a refusal like any other.
    """

    def __init__(self, name: str, *, may_load: bool) -> None:
        self._may_load = may_load
        self._broken: Refusal | None = None
        try:
            self._backend: Capability | None = registry.find(name)
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
            loads = isinstance(self._backend, (LibraryBackend, ExpertBackend))
            if not reasons and self._may_load and loads:
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
        return tuple(self._backend(name, "") for name in registry.NAMES)

    def experts(self) -> tuple[BackendRecord, ...]:
        """The verdict of every backend that has an expert matmul."""
        return tuple(self._backend(name, registry.EXPERTS) for name in registry.EXPERT_NAMES)

    def routes(self) -> tuple[ChoiceRecord, ...]:
        """The route table."""
        return self._routes("")

    def expert_routes(self) -> tuple[ChoiceRecord, ...]:
        """The same for expert matmuls."""
        return self._routes(registry.EXPERTS)

    def call(self, call: Call) -> CallRecord:
        """One call."""
        choice, decision = self._choose(problem_of(call, self.allowed))
        if decision is None:
            return CallRecord(
                choice=choice, assessments=choice.passed_over, text=choice.error or ""
            )
        assessments = tuple(_assessment(one) for one in decision.assessments)
        return CallRecord(choice=choice, assessments=assessments, text=str(decision))

    def _problems(self, recipe: Recipe, family: str) -> tuple[LinearProblem, ...]:
        asked = expert_problems if family else linear_problems
        return tuple(asked(recipe, self.allowed))

    def _routes(self, family: str) -> tuple[ChoiceRecord, ...]:
        return tuple(
            self._choose(problem)[0]
            for recipe in RECIPES
            for problem in self._problems(recipe, family)
        )

    @functools.cached_property
    def _standings(self) -> dict[tuple[str, Recipe], Standing]:
        return {}

    @functools.cached_property
    def _candidates(self) -> dict[str, _Asked]:
        may_load = self.probe and not self.device.simulated
        names = [family + name for family in ("", registry.EXPERTS) for name in registry.NAMES]
        return {name: _Asked(name, may_load=may_load) for name in names}

    def _standing(self, name: str, recipe: Recipe) -> Standing:
        known = self._standings.get((name, recipe))
        if known is None:
            known = self._standings[name, recipe] = self._find_standing(name, recipe)
        return known

    def _find_standing(self, name: str, recipe: Recipe) -> Standing:
        if self.device.simulated:
            if name.removeprefix(registry.EXPERTS) == "eager":
                return Standing("not needed", "plain torch defines the numbers", usable=True)
            return Standing("untested", _SIMULATED, usable=True)
        device, machine = self.device.name, self.device.machine
        if self.probe:
            self.on_step(f"testing {name}, {recipe}, on {self.device.name}")
            return decide.standing(name, device, machine, recipe)
        # As while a graph is captured: nothing is found out. But what is merely untested is not
        # out of the running here, since the first call would test it.
        known = decide.standing(name, device, machine, recipe, capturing=True)
        if known.verdict != "untested":
            return known
        return replace(known, reason=_NOT_YET, usable=True)

    def _backend(self, name: str, family: str) -> BackendRecord:
        asked = self._candidates[family + name]
        reasons = refuse_unnamed(name, asked, self.allowed)  # tested only where it is named
        reasons += asked.refuse_machine(self.device.machine)
        if reasons:
            return BackendRecord(name=name, refusals=_refusals(name, reasons))
        recipes = tuple(self._recipe(name, family, recipe) for recipe in RECIPES)
        return BackendRecord(name=name, refusals=(), recipes=recipes)

    def _recipe(self, name: str, family: str, recipe: Recipe) -> RecipeRecord:
        asked, machine = self._candidates[family + name], self.device.machine
        problems = self._problems(recipe, family)
        answers = [asked.refuse_problem(problem, machine) for problem in problems]
        if all(answers):
            # Of the first, which is aligned: what it refuses is the recipe.
            return RecipeRecord(
                recipe=str(recipe),
                verdict="refused",
                reason=f"{name} does not take it",
                refusals=_refusals(name, answers[0]),
            )
        standing = self._standing(family + name, recipe)
        return RecipeRecord(recipe=str(recipe), verdict=standing.verdict, reason=standing.reason)

    def _choose(self, problem: LinearProblem) -> tuple[ChoiceRecord, Decision | None]:
        family = problem.family
        tuned = None
        if self.allowed.tuned and not self.device.simulated:
            tuned = orders.find(problem, self.device.machine, quietly=True)
        order, route = routes.order_for(problem, self.device.machine, registry.NAMES, tuned)
        chosen = ChoiceRecord(
            recipe=str(problem.recipe),
            m=problem.m,
            n=problem.n,
            k=problem.k,
            experts=problem.experts if isinstance(problem, ExpertsProblem) else None,
            batched=isinstance(problem, ExpertsProblem) and problem.batched,
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
                lambda name: self._candidates[family + name],
                lambda name: (
                    decide.found_wrong(name, tuned) or self._standing(family + name, problem.recipe)
                ),
                route,
            )
        except BackendUnavailableError as error:
            passed_over = tuple(
                self._refused(problem, name, tuned) for name in self.allowed.order(order)
            )
            return chosen.model_copy(update={"error": str(error), "passed_over": passed_over}), None
        decision = decide.with_tile(decision, self.allowed, tuned)
        tile = decision.problem.tile
        before = [one.backend for one in decision.assessments].index(decision.backend)
        answers = {
            "backend": decision.backend,
            "decided_by": decision.decided_by,
            "route": decision.route,
            "tile": "" if tile is None else str(tile),
            "numbers": "" if decision.standing is None else decision.standing.verdict,
            "passed_over": tuple(_assessment(one) for one in decision.assessments[:before]),
            "also": decision.others,
        }
        return chosen.model_copy(update=answers), decision

    def _refused(
        self, problem: LinearProblem, name: str, tuned: TunedRoute | None
    ) -> AssessmentRecord:
        """Why one backend does not run a call that none of them runs, as the router has it."""
        asked = self._candidates[problem.family + name]
        reasons = refusals_of(name, asked, problem, self.device.machine, self.allowed)
        if not reasons:
            standing = decide.found_wrong(name, tuned) or self._standing(
                problem.family + name, problem.recipe
            )
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
