"""Which backends a call may use, and the only reader of environment variables.

The nearest statement wins: the argument ``backend=`` of a call, then `use_backend`, then
`set_backend`, then the environment, then the tuned order, then the default one. A statement is a
text:

    "triton"          this backend, or an error with its refusals
    "triton,eager"    the first of these that takes the call, or an error
    "-cublaslt"       any but this one

| variable                | value                                                              |
|-------------------------|--------------------------------------------------------------------|
| `FP8DISPATCH_BACKEND`   | a statement as above                                               |
| `FP8DISPATCH_ACCURACY`  | `exact` (default) or `fast`: the least exact accumulation allowed  |
| `FP8DISPATCH_BATCH_INVARIANT` | `1`: a row's result depends on no other row, nor on M     |
| `FP8DISPATCH_DGRAD`     | `dequantized` (default) or `fp8`: how dX is computed               |
| `FP8DISPATCH_TUNED`     | `0` leaves the orders that `fp8dispatch tune` measured alone       |
| `FP8DISPATCH_PLUGINS`   | `0` leaves third-party backends alone                              |
| `FP8DISPATCH_CACHE_DIR` | where verdicts and tuned orders are kept, not the user's cache    |

The first five are read once, at the first call; `reload_environment` reads them again.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fp8dispatch import generation
from fp8dispatch.errors import ConfigurationError, UnknownBackendError
from fp8dispatch.kernels.tile import Tile
from fp8dispatch.problem import Accuracy, Dgrad

BACKEND_VARIABLE = "FP8DISPATCH_BACKEND"
ACCURACY_VARIABLE = "FP8DISPATCH_ACCURACY"
INVARIANT_VARIABLE = "FP8DISPATCH_BATCH_INVARIANT"
DGRAD_VARIABLE = "FP8DISPATCH_DGRAD"
TUNED_VARIABLE = "FP8DISPATCH_TUNED"
PLUGINS_VARIABLE = "FP8DISPATCH_PLUGINS"
CACHE_VARIABLE = "FP8DISPATCH_CACHE_DIR"
# Triton's own variable: it decides, when a kernel is defined, whether CPU tensors can be run.
_TRITON_INTERPRET = "TRITON_INTERPRET"
_OFF = ("0", "false", "no", "off")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Policy:
    """What the user allows.

    Attributes:
        only: backends to try in this order; empty means the default order.
        excluded: backends never to use.
        accuracy: the least exact class of accumulation allowed.
        batch_invariant: backend, tile and order of summation must be the same for every M.
        source: who said so, for explanations: "default", "argument backend=" and the like.
        dgrad: how the gradient of X is computed; FP8 runs or the forward call raises.
        tuned: the orders that were measured on this machine come before the default ones.
        tile: the tile that the chosen backend uses; stated by tuning alone, while it measures.
    """

    only: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    accuracy: Accuracy = Accuracy.EXACT
    batch_invariant: bool = False
    source: str = "default"
    dgrad: Dgrad = Dgrad.DEQUANTIZED
    tuned: bool = True
    tile: Tile | None = None

    @property
    def forced(self) -> bool:
        """One backend and no other: it runs, or the call raises."""
        return len(self.only) == 1

    def order(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """The backends to try, in order."""
        return tuple(name for name in (self.only or default) if name not in self.excluded)


@dataclass(frozen=True)
class Statement:
    """What one place says; None leaves the question to the next place.

    Attributes:
        backends: a text such as "triton", "triton,eager" or "-cublaslt".
        accuracy: the least exact class of accumulation allowed.
        batch_invariant: whether results may depend on the number of rows.
        dgrad: how the gradient of X is computed.
        tuned: whether tuned orders are followed.
        tile: the tile that the chosen backend uses.
    """

    backends: str | None = None
    accuracy: Accuracy | None = None
    batch_invariant: bool | None = None
    dgrad: Dgrad | None = None
    tuned: bool | None = None
    tile: Tile | None = None


_NOTHING = Statement()
_DEFAULT = Policy()
_in_context: ContextVar[Statement | None] = ContextVar("fp8dispatch_policy", default=None)
in_context = _in_context.get  # what `use_backend` states here and now; read in every call
_of_process = _NOTHING
_of_environment: Statement | None = None
_reloads = 0

dgrad_stated = ""
"""All that is stated, as a text, while anything about dgrad is. The guards of torch.compile compare
it: they cannot read a ContextVar. It follows the thread that stated something last; a graph that
runs under another policy than it was recorded for says so itself (`fp8dispatch.graph_policy`)."""


def resolve(backend: str | None, known: tuple[str, ...]) -> Policy:
    """The policy of one call with the argument `backend`.

    Raises:
        UnknownBackendError: a name that is not registered.
        ConfigurationError: the environment has a value that cannot be read.
    """
    context = _in_context.get()
    if backend is None and context is None and _of_process == _of_environment == _NOTHING:
        return _DEFAULT  # the usual case, in every call
    check_backend(backend, known)
    places = (("argument backend=", Statement(backend)), *statements(known))
    accuracy = next((said.accuracy for _, said in places if said.accuracy), Accuracy.EXACT)
    stated = (said.batch_invariant for _, said in places if said.batch_invariant is not None)
    invariant = next(stated, False)
    dgrad = next((said.dgrad for _, said in places if said.dgrad), Dgrad.DEQUANTIZED)
    tuned = next((said.tuned for _, said in places if said.tuned is not None), True)
    tile = next((said.tile for _, said in places if said.tile), None)
    for source, said in places:
        if said.backends is not None:
            only, excluded = parse_backends(said.backends, known)
            return Policy(only, excluded, accuracy, invariant, source, dgrad, tuned, tile)
    return Policy(accuracy=accuracy, batch_invariant=invariant, dgrad=dgrad, tuned=tuned, tile=tile)


def statements(known: tuple[str, ...]) -> tuple[tuple[str, Statement], ...]:
    """What each place beside the argument states now, the nearest first.

    Raises:
        ConfigurationError: the environment has a value that cannot be read.
    """
    return (
        ("use_backend", _in_context.get() or _NOTHING),
        ("set_backend", _of_process),
        (BACKEND_VARIABLE, _environment(known)),
    )


def enter(statement: Statement) -> Token[Statement | None]:
    """State something for this thread or task; what it leaves open stays as it was."""
    outer = _in_context.get() or _NOTHING
    token = _in_context.set(
        Statement(
            outer.backends if statement.backends is None else statement.backends,
            statement.accuracy or outer.accuracy,
            outer.batch_invariant
            if statement.batch_invariant is None
            else statement.batch_invariant,
            statement.dgrad or outer.dgrad,
            outer.tuned if statement.tuned is None else statement.tuned,
            statement.tile or outer.tile,
        )
    )
    _restate()
    return token


def leave(token: Token[Statement | None]) -> None:
    """End what `enter` stated."""
    _in_context.reset(token)
    _restate()


def state_for_process(statement: Statement) -> None:
    """Replace what the process states."""
    global _of_process
    _of_process = statement
    _restate()
    generation.renew()


def reload_environment() -> None:
    """Forget what the environment said; the next call reads it again."""
    global _of_environment, _reloads
    _of_environment = None
    _reloads += 1
    _restate()
    generation.renew()


def check_backend(backend: str | None, known: tuple[str, ...]) -> None:
    """A registered backend name, or None.

    Raises:
        UnknownBackendError: anything else.
    """
    if backend is not None and (not isinstance(backend, str) or backend not in known):
        raise UnknownBackendError(
            f"backend must be one of {', '.join(known)} or None, found {backend!r}"
        )


@functools.lru_cache(maxsize=256)
def parse_backends(text: str, known: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``(only, excluded)`` of a statement such as ``"triton,eager"`` or ``"-cublaslt"``.

    Raises:
        UnknownBackendError: a name that is not in `known`.
    """
    only: list[str] = []
    excluded: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        name = part.removeprefix("-")
        if name not in known:
            raise UnknownBackendError(
                f"a backend must be one of {', '.join(known)}, found {part!r}"
            )
        (excluded if part.startswith("-") else only).append(name)
    return tuple(only), tuple(excluded)


def plugins_allowed() -> bool:
    """Third-party backends may be loaded."""
    return os.environ.get(PLUGINS_VARIABLE, "1").strip().lower() not in _OFF


def cache_directory() -> Path:
    """Where verdicts and tuned orders are: ``FP8DISPATCH_CACHE_DIR``, or the user's own cache."""
    stated = os.environ.get(CACHE_VARIABLE)
    if stated:
        return Path(stated)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "fp8dispatch"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fp8dispatch"


def cuda_visible_devices() -> str | None:
    """``CUDA_VISIBLE_DEVICES`` as it stands; None when it is not set."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def cuda_compiler() -> Path:
    """The nvcc that DeepGEMM compiles with, whether it is there or not.

    ``DG_JIT_NVCC_COMPILER``, else the one in ``CUDA_HOME`` or ``CUDA_PATH``, on the search path, or
    in ``/usr/local/cuda``.
    """
    stated = os.environ.get("DG_JIT_NVCC_COMPILER")
    if stated:
        return Path(stated)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = None if home else shutil.which("nvcc")
    return Path(found) if found else Path(home or "/usr/local/cuda") / "bin" / "nvcc"


def triton_interpreter() -> bool:
    """Triton runs its kernels in the interpreter, on CPU tensors."""
    return os.environ.get(_TRITON_INTERPRET, "0").lower() in ("1", "true", "yes", "on")


def parse_accuracy(text: str, what: str) -> Accuracy:
    """An accuracy class by its name; `what` names the place that said it.

    Raises:
        ConfigurationError: another text.
    """
    classes = [member.value for member in Accuracy]
    if text not in classes:
        raise ConfigurationError(f"{what} must be one of {', '.join(classes)}, found {text!r}")
    return Accuracy(text)


def parse_dgrad(text: str, what: str) -> Dgrad:
    """How dX is computed, by its name; `what` names the place that said it.

    Raises:
        ConfigurationError: another text.
    """
    ways = [member.value for member in Dgrad]
    if text not in ways:
        raise ConfigurationError(f"{what} must be one of {', '.join(ways)}, found {text!r}")
    return Dgrad(text)


def _restate() -> None:
    global dgrad_stated
    said = (_in_context.get(), _of_process, _of_environment)
    relevant = any(one is not None and one.dgrad is not None for one in said)
    unread = _reloads if _of_environment is None else 0  # what it will say is not known yet
    dgrad_stated = repr((said, unread)) if relevant or unread else ""


def _parse_switch(text: str, what: str) -> bool:
    if text in ("1", "true", "yes", "on"):
        return True
    if text in _OFF:
        return False
    raise ConfigurationError(f"{what} must be 1 or 0, found {text!r}")


def _environment(known: tuple[str, ...]) -> Statement:
    global _of_environment
    if _of_environment is None:
        backends = os.environ.get(BACKEND_VARIABLE, "").strip()
        accuracy = os.environ.get(ACCURACY_VARIABLE, "").strip()
        invariant = os.environ.get(INVARIANT_VARIABLE, "").strip().lower()
        dgrad = os.environ.get(DGRAD_VARIABLE, "").strip()
        tuned = os.environ.get(TUNED_VARIABLE, "").strip().lower()
        if backends:
            try:
                parse_backends(backends, known)
            except UnknownBackendError as error:
                raise ConfigurationError(
                    f"{BACKEND_VARIABLE}={backends!r} cannot be read, since {error}"
                ) from error
        _of_environment = Statement(
            backends or None,
            parse_accuracy(accuracy, ACCURACY_VARIABLE) if accuracy else None,
            _parse_switch(invariant, INVARIANT_VARIABLE) if invariant else None,
            parse_dgrad(dgrad, DGRAD_VARIABLE) if dgrad else None,
            _parse_switch(tuned, TUNED_VARIABLE) if tuned else None,
        )
        _restate()
    return _of_environment
