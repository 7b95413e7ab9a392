"""Asks everything that a report holds, and says how healthy it is.

Unless probing is asked for nothing here starts CUDA or imports torch; that torch is not there is a
finding like any other.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator

from fp8dispatch import __version__
from fp8dispatch.doctor.decisions import Examination
from fp8dispatch.doctor.devices import Device, find_devices
from fp8dispatch.doctor.libraries import describe_libraries
from fp8dispatch.doctor.overrides import (
    describe_cache,
    describe_overrides,
    describe_quarantine,
    describe_tuned,
    resolve_policy,
)
from fp8dispatch.doctor.questions import Call
from fp8dispatch.doctor.report import (
    EXIT_CODES,
    BackendRecord,
    ChoiceRecord,
    DeviceRecord,
    Finding,
    Report,
    status_of,
)
from fp8dispatch.doctor.secrets import scrubbed, shown_variables
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.policy import Policy
from fp8dispatch.probes.packages import package_report

# Refusals that tell of an installation which can be repaired: the wrong torch for a library, one
# that does not import, a plugin that does not answer. All others are as they should be.
_REPAIRABLE = frozenset({"torch", "import", "operator", "compiler", "plugin"})


def collect(
    *,
    machine: str | None = None,
    device: int | None = None,
    call: Call | None = None,
    probe: bool = False,
    clear_cache: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Report:
    """Everything about this machine, or about one of the gallery.

    Args:
        machine: a name of `fp8dispatch.probes.gallery`; nothing can be tested there.
        device: the one GPU to ask about; None asks about all.
        call: a call to explain on each device.
        probe: import torch and the libraries, and find out verdicts that are not known yet: starts
            CUDA, takes seconds to minutes.
        clear_cache: delete the stored verdicts and tuned routes first.
        on_step: told what is about to be tested.

    Raises:
        InvalidInputError: an unknown machine, a GPU that is not there, a probe of a machine that
            is not here.
    """
    if machine is not None and (probe or device is not None):
        raise InvalidInputError(
            f"--machine {machine} stands for a machine that is not here, so --probe and --device "
            f"have nothing to ask; leave them out"
        )
    cache, cache_findings = describe_cache(clear=clear_cache)
    allowed, policy_findings = resolve_policy()
    found = find_devices(machine=machine, index=device, probe=probe)
    devices = tuple(_examine(one, allowed, call, probe, on_step) for one in found.devices)
    if probe:  # what was found out just now is stored by now
        cache = describe_cache(clear=False)[0].model_copy(update={"cleared": cache.cleared})
    findings = (
        *found.findings,
        *policy_findings,
        *(finding for one in devices for finding in _judge(one, allowed)),
        *(
            Finding(level="degraded", sentence=f"{held.backend} failed here: {held.reason}")
            for held in describe_quarantine()
        ),
        *cache_findings,
        *(
            Finding(level="note", sentence=sentence)
            for one in found.devices
            if one.decided and not one.simulated
            for sentence in (describe_tuned(one.machine, allowed)[1],)
            if sentence
        ),
        *(
            Finding(level="note", sentence=problem)
            for problem in (package_report().problems if machine is None else ())
        ),
    )
    unique = tuple(dict.fromkeys(findings))
    status = status_of(unique)
    report = Report(
        fp8dispatch=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        probed=probe,
        status=status,
        exit_code=EXIT_CODES[status],
        findings=unique,
        devices=devices,
        libraries=describe_libraries(found.versions),
        overrides=describe_overrides(),
        environment=shown_variables(os.environ),
        quarantine=describe_quarantine(),
        cache=cache,
    )
    return scrubbed(report, os.environ)


def _examine(
    device: Device,
    allowed: Policy,
    call: Call | None,
    probe: bool,
    on_step: Callable[[str], None],
) -> DeviceRecord:
    machine = device.machine
    record = DeviceRecord(
        device=device.name,
        name=machine.device_name,
        capability=machine.capability,
        architecture=machine.architecture,
        consumer=machine.is_consumer,
        driver=machine.driver,
        memory_bytes=machine.memory_bytes,
        mig=machine.mig,
        uuid=machine.uuid,
        simulated=device.simulated,
        decided=device.decided,
    )
    if not device.decided:
        return record
    asked = Examination(device, allowed, probe, on_step)
    if not device.simulated:
        record = record.model_copy(update={"tuned": describe_tuned(machine, allowed)[0]})
    return record.model_copy(
        update={
            "backends": asked.backends(),
            "routes": asked.routes(),
            "experts": asked.experts(),
            "expert_routes": asked.expert_routes(),
            "call": None if call is None else asked.call(call),
        }
    )


def _judge(device: DeviceRecord, allowed: Policy) -> Iterator[Finding]:
    """What is wrong with a device; refusals that are to be expected are not."""
    for backends, what in ((device.backends, ""), (device.experts, " (experts)")):
        for backend in backends:
            yield from _judge_backend(backend, what, device.device)
    for routes, table, what in (
        (device.routes, "route table", ""),
        (device.expert_routes, "table of experts", "experts in "),
    ):
        yield from _judge_routes(routes, table, what, device, allowed)


def _judge_backend(backend: BackendRecord, what: str, where: str) -> Iterator[Finding]:
    for one in backend.recipes:
        if one.verdict == "wrong":
            sentence = f"{backend.name}{what} is wrong for {one.recipe} on {where}: {one.reason}"
            yield Finding(level="broken", sentence=sentence)
    for reasons in (backend.refusals, *(one.refusals for one in backend.recipes)):
        # Beside a reason that cannot be repaired the others do not matter.
        if reasons and all(reason.code in _REPAIRABLE for reason in reasons):
            for reason in reasons:
                yield Finding(level="degraded", sentence=f"on {where} {reason.sentence}")


def _judge_routes(
    routes: tuple[ChoiceRecord, ...], table: str, what: str, device: DeviceRecord, allowed: Policy
) -> Iterator[Finding]:
    where = device.device
    failing = [choice for choice in routes if choice.backend is None]
    if failing:
        sentence = (
            f"on {where} {len(failing)} of the {len(routes)} calls in the {table} "
            f"raise, the first because {failing[0].error}"
        )
        yield Finding(level="degraded", sentence=sentence)
    slow = [choice.recipe for choice in routes if choice.backend == "eager"]
    if slow and device.capability and "eager" not in allowed.only:
        recipes = ", ".join(dict.fromkeys(slow))
        sentence = (
            f"on {where} ({device.name}) only plain torch, which is slow, takes {what}{recipes}"
        )
        yield Finding(level="degraded", sentence=sentence)
