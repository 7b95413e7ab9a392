"""What the doctor found, as data that goes to a file; `schema_version` guards its meaning."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION: Literal[3] = 3

Level = Literal["note", "degraded", "no gpu", "broken"]
Status = Literal["healthy", "degraded", "no gpu", "broken"]

EXIT_CODES: dict[Status, int] = {"healthy": 0, "degraded": 1, "no gpu": 3, "broken": 4}
"""Of each status; 2 is usage and 5 interrupted, which leave no report."""


class Record(BaseModel):
    """A part of the report."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Finding(Record):
    """One sentence about what is not as it should be, or, as a note, is worth knowing."""

    level: Level
    sentence: str


class LibraryRecord(Record):
    """One library.

    Attributes:
        name: of the distribution.
        found: its version, None where it is not installed.
        needs: the torch that this release loads with, ``"torch 2.11"``; empty where any may do.
        fits: whether the installed torch is that one.
        install: what installs the release that fits the installed torch, or why there is none;
            empty where nothing is to be installed.
    """

    name: str
    found: str | None
    needs: str
    fits: bool
    install: str


class RefusalRecord(Record):
    """Why a backend does not run something: the need and what was found, and both in a sentence."""

    code: str
    need: str
    found: str
    sentence: str


class RecipeRecord(Record):
    """One backend and one recipe on one device.

    Attributes:
        verdict: of its numbers (``right``, ``wrong``, ``untested``, ``not needed``,
            ``quarantined``), or ``refused`` where it does not take the recipe.
        reason: how the verdict is known.
        refusals: all of them where it is refused.
    """

    recipe: str
    verdict: str
    reason: str
    refusals: tuple[RefusalRecord, ...] = ()


class BackendRecord(Record):
    """One backend on one device; `recipes` is empty where `refusals` says that it cannot run."""

    name: str
    refusals: tuple[RefusalRecord, ...]
    recipes: tuple[RecipeRecord, ...] = ()


class AssessmentRecord(Record):
    """What one backend answered for one call; without refusals it would take it."""

    backend: str
    refusals: tuple[RefusalRecord, ...]


class ChoiceRecord(Record):
    """What runs one call, and why.

    Attributes:
        experts: how many there are, of an expert matmul; None for a linear layer.
        batched: each row of it names its expert; else rows come sorted by expert.
        backend: the chosen one; None where every allowed backend refuses, so that the call raises.
        decided_by: ``"default"``, ``"use_backend"``, ``"FP8DISPATCH_BACKEND"`` and the like.
        route: where the order of backends comes from, with its evidence.
        tile: the tuned tile of the chosen backend, "64x128, 4 warps, 3 stages"; empty where it
            makes its own choice.
        numbers: what is known of the chosen backend's numbers.
        passed_over: those that came before the chosen one in the order, and why they do not run;
            all that are allowed where nothing is chosen.
        also: those after it that would take the call as well.
        error: what the call raises where nothing is chosen.
    """

    recipe: str
    m: int
    n: int
    k: int
    experts: int | None = None
    batched: bool = False
    backend: str | None
    decided_by: str
    route: str
    tile: str = ""
    numbers: str
    passed_over: tuple[AssessmentRecord, ...]
    also: tuple[str, ...] = ()
    error: str | None = None


class CallRecord(Record):
    """The one call that was asked about: its choice, every backend's answer, and all as text."""

    choice: ChoiceRecord
    assessments: tuple[AssessmentRecord, ...]
    text: str


class TunedRecord(Record):
    """The orders that `fp8dispatch tune` measured on one device.

    Attributes:
        routes: how many sizes were measured, for this GPU, driver and these versions.
        in_force: whether decisions follow them; not where FP8DISPATCH_TUNED turns them off.
        file: where they are kept; None where there are none, or for one process alone.
        date: of the newest; empty where there are none.
    """

    routes: int
    in_force: bool
    file: str | None
    date: str


class DeviceRecord(Record):
    """One device, every backend's verdict on it, and what it would choose.

    Attributes:
        device: as torch names it, ``"cuda:0"``; for a simulated machine its name.
        simulated: it is not here; nothing was or can be tested on it.
        decided: whether backends were asked; where not, a finding says why.
        experts, expert_routes: the same as `backends` and `routes` of expert matmuls, for the
            backends that have one.
        tuned: what was tuned on it; None where it was not asked.
    """

    device: str
    name: str
    capability: tuple[int, int] | None
    architecture: str
    consumer: bool
    driver: str
    memory_bytes: int
    mig: bool
    uuid: str
    simulated: bool
    decided: bool
    backends: tuple[BackendRecord, ...] = ()
    routes: tuple[ChoiceRecord, ...] = ()
    experts: tuple[BackendRecord, ...] = ()
    expert_routes: tuple[ChoiceRecord, ...] = ()
    call: CallRecord | None = None
    tuned: TunedRecord | None = None


class OverrideRecord(Record):
    """What one place states about backends, the nearest place first; None where it says nothing."""

    source: str
    backends: str | None
    accuracy: str | None
    batch_invariant: bool | None
    dgrad: str | None
    in_force: bool


class VariableRecord(Record):
    """An environment variable that fp8dispatch reads; a value that looks secret is hidden."""

    name: str
    value: str


class QuarantineRecord(Record):
    """A backend that failed in a call of this process."""

    backend: str
    device: str
    recipe: str
    reason: str


class CacheRecord(Record):
    """Where verdicts and tuned routes are kept.

    Attributes:
        path: the directory of the verdicts; None where there is no home to keep one in.
        verdicts: how many are stored.
        cleared: how many were deleted before; None where nobody asked for it.
        tuned_path: the directory of the tuned routes.
        tuned_files: how many files of tuned routes there are, one for each device and versions.
        tuned_cleared: how many of them were deleted before; None where nobody asked for it.
    """

    path: str | None
    verdicts: int
    cleared: int | None = None
    tuned_path: str | None = None
    tuned_files: int = 0
    tuned_cleared: int | None = None


class Report(Record):
    """The whole result.

    Attributes:
        probed: torch and the libraries were imported and the numbers tested; without it the report
            says what files, NVML and stored verdicts tell, and not whether an import would work.
    """

    schema_version: Literal[3] = SCHEMA_VERSION
    fp8dispatch: str
    python: str
    system: str
    probed: bool
    status: Status
    exit_code: int
    findings: tuple[Finding, ...]
    devices: tuple[DeviceRecord, ...]
    libraries: tuple[LibraryRecord, ...]
    overrides: tuple[OverrideRecord, ...]
    environment: tuple[VariableRecord, ...]
    quarantine: tuple[QuarantineRecord, ...]
    cache: CacheRecord


def status_of(findings: tuple[Finding, ...]) -> Status:
    """The worst of the findings: wrong numbers, then no GPU, then what can be repaired."""
    levels = {finding.level for finding in findings}
    ordered: tuple[Status, ...] = ("broken", "no gpu", "degraded")
    return next((status for status in ordered if status in levels), "healthy")
