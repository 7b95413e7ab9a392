"""Whom the router may trust: verdicts of the canary, and the quarantine of what failed at run time.

A backend is trusted on a device, for a recipe, after it has computed the right numbers there once.
Verdicts are looked up in memory, then on disk, and then found out: in this process where the code
is ours or listed as verified for the device's capability, else first in a child process. "Could
not test" (memory, time under load, a busy device) is neither right nor wrong; it is not stored, and
asked again after `RETRY_S`.

The quarantine is apart from that: it holds for this process, and for what raised in a real call.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fp8dispatch import __version__, policy, registry
from fp8dispatch.failures import describe_error, is_out_of_memory, verdict_of_error
from fp8dispatch.machine import Machine
from fp8dispatch.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from fp8dispatch.backends.contract import Capability
    from fp8dispatch.probes.store import Fingerprint, VerdictStore

State = Literal["right", "wrong", "untested", "not needed"]

PROBE_LIMIT_S = 120.0
"""What a backend may take in a child process; most of it is compilation at the first call."""

WAIT_LIMIT_S = 180.0
"""How long to wait for another process that probes the same before going without."""

RETRY_S = 300.0
"""After this time a backend that could not be tested is tested again."""

# Plain torch and our own Triton kernels: no foreign native code that could end the process.
_OURS = frozenset({"eager", "triton", "experts.eager", "experts.triton"})

_log = logging.getLogger("fp8dispatch")


@dataclass(frozen=True)
class Verdict:
    """What is known of a backend's numbers on a device, for a recipe.

    Attributes:
        state: ``untested`` where it is not known (yet), ``not needed`` for plain torch.
        reason: a sentence.
        source: ``"in this process"``, ``"in a child process"``, ``"disk"`` or ``"nobody"``.
    """

    state: State
    reason: str
    source: str


_Key = tuple[str, str, Recipe]

_known: dict[_Key, Verdict] = {}
_untested: dict[_Key, tuple[Verdict, float]] = {}
_quarantine: dict[_Key, str] = {}
_guard = threading.Lock()
_probing: defaultdict[_Key, threading.Lock] = defaultdict(threading.Lock)
_stores: dict[str, VerdictStore | None] = {}


def judge(
    backend_name: str,
    backend: Capability,
    device: torch.device | str,
    machine: Machine,
    recipe: Recipe,
    *,
    may_probe: bool,
) -> Verdict:
    """What is known of a backend's numbers, finding out where it may.

    Args:
        backend_name: its registered name, or ``"module:attribute"`` where it has none; a child
            process loads it by this.
        backend: the backend itself.
        device: where the call's tensors lie, or its name, ``"cuda:0"``.
        machine: the same device and its libraries as plain data.
        recipe: what the weight scale means.
        may_probe: False gives what memory and disk know, as while a CUDA graph is captured.
    """
    if backend_name in ("eager", "experts.eager"):
        return Verdict("not needed", "plain torch defines the numbers", "nobody")
    key = _key(backend_name, device, recipe)
    verdict = _remembered(key)
    if verdict is not None:
        return verdict
    fingerprint = _fingerprint(backend_name, backend, machine, recipe)
    store = _store()
    verdict = _stored(key, fingerprint, store)
    if verdict is not None:
        return verdict
    if not may_probe:
        return Verdict("untested", "it was not tested yet and must not be now", "nobody")
    with _guard:
        lock = _probing[key]
    with lock:  # threads of this process: the first one finds out, the others read
        verdict = _remembered(key)
        if verdict is None:
            verdict = _find_out(key, backend, device, machine, fingerprint, store)
    return verdict


def quarantine(
    backend_name: str, device: torch.device, recipe: Recipe, error: BaseException | str
) -> None:
    """Put a backend aside in this process because a real call failed; the first reason is kept.

    Raises:
        BaseException: `error` itself when memory ran out: that is nobody's fault.
    """
    if isinstance(error, BaseException):
        if is_out_of_memory(error):
            raise error
        error = describe_error(error)
    with _guard:
        _quarantine.setdefault(_key(backend_name, device, recipe), error)


def quarantined(backend_name: str, device: torch.device | str, recipe: Recipe) -> str | None:
    """Why a backend is in quarantine; None where it is not."""
    return _quarantine.get(_key(backend_name, device, recipe))


def quarantines() -> dict[tuple[str, str, Recipe], str]:
    """All of the quarantine: (backend, device, recipe) -> reason."""
    with _guard:
        return dict(_quarantine)


def release(backend_name: str | None = None) -> int:
    """Let a backend, or all, out of quarantine; the number of entries dropped."""
    with _guard:
        freed = [key for key in _quarantine if backend_name in (None, key[0])]
        for key in freed:
            del _quarantine[key]
    return len(freed)


def forget() -> None:
    """Drop the verdicts in memory; those on disk stay."""
    with _guard:
        _known.clear()
        _untested.clear()
        _stores.clear()


def clear_stored() -> int:
    """Drop the verdicts in memory and on disk; the number of those on disk.

    Raises:
        OSError: a file that cannot be deleted.
    """
    forget()
    store = _store()
    return 0 if store is None else store.clear()


def _key(backend_name: str, device: torch.device | str, recipe: Recipe) -> _Key:
    return backend_name, str(device), recipe


def _remembered(key: _Key) -> Verdict | None:
    with _guard:
        if key in _known:
            return _known[key]
        verdict, since = _untested.get(key, (None, 0.0))
    return verdict if verdict is not None and time.monotonic() - since < RETRY_S else None


def _remember(key: _Key, verdict: Verdict) -> Verdict:
    with _guard:
        if verdict.state == "untested":
            _untested[key] = (verdict, time.monotonic())
        else:
            _known[key] = verdict
    return verdict


def _stored(key: _Key, fingerprint: Fingerprint, store: VerdictStore | None) -> Verdict | None:
    found = None if store is None else store.get(fingerprint)
    return None if found is None else _remember(key, Verdict(found.state, found.reason, "disk"))


def _find_out(
    key: _Key,
    backend: Capability,
    device: torch.device | str,
    machine: Machine,
    fingerprint: Fingerprint,
    store: VerdictStore | None,
) -> Verdict:
    """Probe, unless another process of this host does so and is done in time."""
    if store is None:
        return _remember(key, _probe(key, backend, device, machine))
    with store.probing(fingerprint, WAIT_LIMIT_S) as mine:
        verdict = _stored(key, fingerprint, store)
        if verdict is not None:
            return verdict
        if not mine:
            reason = f"another process still tests it after {WAIT_LIMIT_S:g} s"
            return _remember(key, Verdict("untested", reason, "nobody"))
        verdict = _remember(key, _probe(key, backend, device, machine))
        if verdict.state in ("right", "wrong"):
            store.put(fingerprint, "right" if verdict.state == "right" else "wrong", verdict.reason)
        return verdict


def _probe(key: _Key, backend: Capability, device: torch.device | str, machine: Machine) -> Verdict:
    name, _, recipe = key
    _log.debug("testing the numbers of %s for %s on %s", name, recipe, device)
    if name in _OURS or backend.is_verified(machine):
        verdict = _in_process(backend, device, recipe)
    else:
        from fp8dispatch.probes.isolated import run_isolated

        result = run_isolated(name, str(device), recipe, PROBE_LIMIT_S)
        state: State = "wrong"
        if result.outcome in ("right", "untested"):
            state = "right" if result.outcome == "right" else "untested"
        verdict = Verdict(state, result.reason, "in a child process")
    if verdict.state == "wrong":
        _log.warning("%s is not used for %s on %s: %s", name, recipe, device, verdict.reason)
    return verdict


def _in_process(backend: Capability, device: torch.device | str, recipe: Recipe) -> Verdict:
    import torch

    from fp8dispatch.probes.numerics import run_canary, synchronize

    device = torch.device(device)
    synchronize(device)  # an earlier error of the caller's own is raised here, and is the caller's
    try:
        # On a thread of its own the canary stands under nobody's inference mode, autocast or
        # transform, and takes no memory from the private pool of a graph that is being warmed up.
        with ThreadPoolExecutor(1, "fp8dispatch-canary") as thread:
            result = thread.submit(run_canary, backend, device, recipe).result()
    except Exception as error:  # noqa: BLE001  # a library may raise anything: that is the finding
        return Verdict(*verdict_of_error(error), "in this process")
    if not result.applicable:
        return Verdict("untested", result.reason, "in this process")
    return Verdict("right" if result.right else "wrong", result.reason, "in this process")


def _fingerprint(
    backend_name: str, backend: Capability, machine: Machine, recipe: Recipe
) -> Fingerprint:
    from fp8dispatch.probes.store import Fingerprint

    wanted = {"torch", "triton", "cuda", "hip", backend.distribution, *backend.distributions}
    versions = {name: text for name, text in machine.versions.items() if name in wanted}
    versions |= backend.toolchain()
    plugin = registry.plugin_version(backend_name)
    if plugin is not None:
        versions["plugin"] = plugin
    return Fingerprint(
        backend=backend_name,
        recipe=str(recipe),
        device=f"{machine.device_type} {machine.device_name}",
        capability=machine.capability,
        driver=machine.driver,
        versions=versions,
        fp8dispatch=__version__,
    )


def _store() -> VerdictStore | None:
    """The verdicts on disk; None where there is no home to keep them in."""
    from fp8dispatch.probes.store import VerdictStore

    try:
        directory = policy.cache_directory()
    except RuntimeError as error:  # pathlib's word for a user without a home
        if "" not in _stores:
            _log.warning("verdicts on backends are kept for this process only: %s", error)
            _stores[""] = None
        return None
    return _stores.setdefault(str(directory), VerdictStore(directory))  # it complains only once


def _after_fork() -> None:
    """A thread that held a lock is not there in the child of a fork."""
    global _guard
    _guard = threading.Lock()
    _probing.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
