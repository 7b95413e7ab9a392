"""What the user has stated about backends, place by place, and what was put aside or stored."""

from __future__ import annotations

from fp8dispatch import policy, registry, trust
from fp8dispatch.doctor.report import (
    CacheRecord,
    Finding,
    OverrideRecord,
    QuarantineRecord,
    TunedRecord,
)
from fp8dispatch.errors import ConfigurationError
from fp8dispatch.machine import Machine
from fp8dispatch.policy import Policy
from fp8dispatch.probes.store import VerdictStore
from fp8dispatch.tuning import orders
from fp8dispatch.tuning.store import TunedStore


def resolve_policy() -> tuple[Policy, tuple[Finding, ...]]:
    """The policy of a call without arguments; the default, and a finding, if it cannot be read."""
    try:
        return policy.resolve(None, registry.NAMES), ()
    except ConfigurationError as error:
        sentence = f"every call raises ({error}); the decisions shown here leave it out"
        return Policy(), (Finding(level="degraded", sentence=sentence),)


def describe_overrides() -> tuple[OverrideRecord, ...]:
    """Each place that can name backends, the nearest first."""
    try:
        stated = policy.statements(registry.NAMES)
    except ConfigurationError:
        stated = ()  # `resolve_policy` has it as a finding
    places = (("argument backend=", policy.Statement()), *stated)
    spoken = {policy.BACKEND_VARIABLE: "environment"}  # it may state the accuracy alone
    records: list[OverrideRecord] = []
    open_questions = {"backends", "accuracy", "batch_invariant", "dgrad"}
    for source, said in places:
        backends = said.backends
        accuracy = None if said.accuracy is None else said.accuracy.value
        dgrad = None if said.dgrad is None else said.dgrad.value
        answered = {
            question
            for question, answer in (
                ("backends", backends),
                ("accuracy", accuracy),
                ("batch_invariant", said.batch_invariant),
                ("dgrad", dgrad),
            )
            if answer is not None
        }
        records.append(
            OverrideRecord(
                source=spoken.get(source, source),
                backends=backends,
                accuracy=accuracy,
                batch_invariant=said.batch_invariant,
                dgrad=dgrad,
                in_force=bool(answered & open_questions),
            )
        )
        open_questions -= answered
    return tuple(records)


def describe_quarantine() -> tuple[QuarantineRecord, ...]:
    """What failed in calls of this process."""
    return tuple(
        QuarantineRecord(backend=backend, device=device, recipe=str(recipe), reason=reason)
        for (backend, device, recipe), reason in trust.quarantines().items()
    )


def describe_cache(*, clear: bool) -> tuple[CacheRecord, tuple[Finding, ...]]:
    """What is stored, where and how much, after deleting it if that is asked for."""
    try:
        directory = VerdictStore(policy.cache_directory()).directory
        tuned = TunedStore(policy.cache_directory())
    except RuntimeError as error:  # pathlib's word for a user without a home
        sentence = f"verdicts and tuned routes are kept for one process only: {error}"
        return CacheRecord(path=None, verdicts=0), (Finding(level="note", sentence=sentence),)
    findings: list[Finding] = []
    cleared: int | None = None
    verdicts = 0
    try:
        if clear:
            cleared = trust.clear_stored()
        verdicts = sum(1 for _ in directory.glob("*.json"))
    except OSError as error:
        sentence = f"the stored verdicts in {directory} cannot be read or deleted: {error}"
        findings.append(Finding(level="degraded", sentence=sentence))
    tuned_cleared: int | None = None
    files = 0
    try:
        if clear:
            tuned_cleared = orders.clear()
        files = tuned.count()
    except OSError as error:
        sentence = f"the tuned routes in {tuned.directory} cannot be read or deleted: {error}"
        findings.append(Finding(level="degraded", sentence=sentence))
    record = CacheRecord(
        path=str(directory),
        verdicts=verdicts,
        cleared=cleared,
        tuned_path=str(tuned.directory),
        tuned_files=files,
        tuned_cleared=tuned_cleared,
    )
    return record, tuple(findings)


def describe_tuned(machine: Machine, allowed: Policy) -> tuple[TunedRecord, str]:
    """What was tuned on a machine, and what was found there that is not for it, in a sentence."""
    found = orders.in_force(machine)
    record = TunedRecord(
        routes=len(found),
        in_force=allowed.tuned and len(found) > 0,
        file=None if found.file is None else str(found.file),
        date=found.date,
    )
    return record, found.ignored
