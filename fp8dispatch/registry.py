"""The backends by name: ours, and those that other packages offer through entry points.

A package offers a backend with the entry-point group ``fp8dispatch.backends``; the entry's name is
the backend's, its object a `fp8dispatch.backends.contract.Backend`. Ours are preferred: a plugin
comes after them and before `eager`, and cannot take one of their names. A plugin that does not load
is kept with its error as its refusal, and harms nothing else.
"""

from __future__ import annotations

import functools
import logging
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from fp8dispatch import policy

if TYPE_CHECKING:
    from fp8dispatch.backends.contract import Backend, Capability
    from fp8dispatch.moe.backends.contract import ExpertBackend

ENTRY_POINTS = "fp8dispatch.backends"
_log = logging.getLogger("fp8dispatch")

# One line per backend: its name and the module whose BACKEND it is, in the order of preference
# where no route says better (`routes`): libraries that are installed for this first, eager last.
_MODULES: dict[str, str] = {
    "fbgemm": "fp8dispatch.backends.fbgemm",
    "mslk": "fp8dispatch.backends.mslk",
    "deepgemm": "fp8dispatch.backends.deepgemm",
    "cublaslt": "fp8dispatch.backends.cublaslt",
    "triton": "fp8dispatch.backends.triton",
    "gluon": "fp8dispatch.backends.gluon",
    "torchao": "fp8dispatch.backends.torchao",
    "cutlass": "fp8dispatch.backends.cutlass",
    "weight_only": "fp8dispatch.backends.weight_only",
    "fbgemm_tile": "fp8dispatch.backends.fbgemm_tile",
    "mslk_tile": "fp8dispatch.backends.mslk_tile",
    "eager": "fp8dispatch.backends.eager",
}

# The same for expert matmuls, which are looked up as "experts.<name>".
EXPERTS = "experts."
_EXPERT_MODULES: dict[str, str] = {
    "triton": "fp8dispatch.moe.backends.triton",
    "gluon": "fp8dispatch.moe.backends.gluon",
    "deepgemm": "fp8dispatch.moe.backends.deepgemm",
    "fbgemm": "fp8dispatch.moe.backends.fbgemm",
    "mslk": "fp8dispatch.moe.backends.mslk",
    "cutlass": "fp8dispatch.moe.backends.cutlass",
    "eager": "fp8dispatch.moe.backends.eager",
}
EXPERT_NAMES: tuple[str, ...] = tuple(_EXPERT_MODULES)
"""Those that have an expert matmul; every other name refuses them."""


def _find_plugins() -> dict[str, metadata.EntryPoint]:
    if not policy.plugins_allowed():
        return {}
    found: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in _MODULES or entry.name in found or not entry.name.isidentifier():
            _log.warning(
                "the backend %r of %s is ignored: it needs a name of its own that is an identifier",
                entry.name,
                entry.value,
            )
            continue
        found[entry.name] = entry
    return found


_PLUGINS = _find_plugins()
NAMES: tuple[str, ...] = (*[name for name in _MODULES if name != "eager"], *_PLUGINS, "eager")


@functools.cache
def load(name: str) -> Backend:
    """The backend called `name`, which must be one of `NAMES`."""
    if name in _MODULES:
        backend: Backend = import_module(_MODULES[name]).BACKEND
        return backend
    return _load_plugin(name)


@functools.cache
def load_experts(name: str) -> ExpertBackend:
    """The backend of expert matmuls called `name`; one that refuses where there is none."""
    from fp8dispatch.moe.backends.missing import Missing

    if name in _EXPERT_MODULES:
        backend: ExpertBackend = import_module(_EXPERT_MODULES[name]).BACKEND
        return backend
    return Missing(name)


def find(name: str) -> Capability:
    """The backend called `name`, of linear layers or, as ``"experts.<name>"``, of experts."""
    if name.startswith(EXPERTS):
        return load_experts(name.removeprefix(EXPERTS))
    return load(name)


def plugin_version(name: str) -> str | None:
    """Version of the package that offers a backend; None for ours and where it states none."""
    entry = _PLUGINS.get(name)
    return entry.dist.version if entry is not None and entry.dist is not None else None


def _load_plugin(name: str) -> Backend:
    from fp8dispatch.backends.broken import Broken
    from fp8dispatch.backends.contract import Backend

    entry = _PLUGINS[name]
    try:
        backend = entry.load()
    except Exception as error:  # noqa: BLE001  # another package's code: its error is its refusal
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        _log.warning("the backend %r of %s does not load: %s", name, entry.value, reason)
        return Broken(name, entry.value, reason)
    if not isinstance(backend, Backend):
        reason = f"an object of type {type(backend).__name__}, not a Backend"
        _log.warning("the backend %r of %s is none: %s", name, entry.value, reason)
        return Broken(name, entry.value, reason)
    return backend
