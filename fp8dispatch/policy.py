"""Which backends a call may use: the only reader of environment variables.

| variable               | value                                                               |
|------------------------|---------------------------------------------------------------------|
| `FP8DISPATCH_BACKEND`  | `triton` (this one or an error), `triton,eager` (the first of these |
|                        | that takes the call, or an error), `-cublaslt` (all but this one)   |
| `FP8DISPATCH_ACCURACY` | `exact` (default) or `fast`: the least exact accumulation allowed   |

Precedence: the argument `backend=` of a call, then the environment, then the default order.
The environment is read once, at the first call; `reload_environment` reads it again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fp8dispatch.errors import ConfigurationError, UnknownBackendError
from fp8dispatch.problem import Accuracy

BACKEND_VARIABLE = "FP8DISPATCH_BACKEND"
ACCURACY_VARIABLE = "FP8DISPATCH_ACCURACY"
# Triton's own variable: it decides, when a kernel is defined, whether CPU tensors can be run.
_TRITON_INTERPRET = "TRITON_INTERPRET"


@dataclass(frozen=True)
class Policy:
    """What the user allows.

    Attributes:
        only: backends to try in this order; empty means the default order.
        excluded: backends never to use.
        accuracy: the least exact class of accumulation allowed.
        source: who said so, for explanations: "default", "argument" or a variable's name.
    """

    only: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    accuracy: Accuracy = Accuracy.EXACT
    source: str = "default"

    def order(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """The backends to try, in order."""
        return tuple(name for name in (self.only or default) if name not in self.excluded)


def parse_backends(text: str, known: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``(only, excluded)`` of a value such as ``"triton,eager"`` or ``"-cublaslt"``.

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


_from_environment: Policy | None = None


def environment_policy(known: tuple[str, ...]) -> Policy:
    """The policy that the environment states; read at the first call and then remembered.

    Raises:
        ConfigurationError: a variable with a value that cannot be read.
    """
    global _from_environment
    if _from_environment is None:
        _from_environment = _read_environment(known)
    return _from_environment


def reload_environment() -> None:
    """Forget what the environment said; the next call reads it again."""
    global _from_environment
    _from_environment = None


def resolve(backend: str | None, known: tuple[str, ...]) -> Policy:
    """The policy of one call with the argument `backend`.

    Raises:
        UnknownBackendError: `backend` is not a registered name.
        ConfigurationError: the environment has a value that cannot be read.
    """
    stated = environment_policy(known)
    if backend is None:
        return stated
    check_backend(backend, known)
    return Policy((backend,), (), stated.accuracy, "argument backend=")


def check_backend(backend: str | None, known: tuple[str, ...]) -> None:
    """A registered backend name, or None.

    Raises:
        UnknownBackendError: anything else.
    """
    if backend is not None and (not isinstance(backend, str) or backend not in known):
        raise UnknownBackendError(
            f"backend must be one of {', '.join(known)} or None, found {backend!r}"
        )


def triton_interpreter() -> bool:
    """Triton runs its kernels in the interpreter, on CPU tensors."""
    return os.environ.get(_TRITON_INTERPRET, "0").lower() in ("1", "true", "yes", "on")


def _read_environment(known: tuple[str, ...]) -> Policy:
    backends = os.environ.get(BACKEND_VARIABLE, "").strip()
    accuracy = os.environ.get(ACCURACY_VARIABLE, "").strip()
    only: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    if backends:
        try:
            only, excluded = parse_backends(backends, known)
        except UnknownBackendError as error:
            raise ConfigurationError(
                f"{BACKEND_VARIABLE}={backends!r} cannot be read, since {error}"
            ) from error
    classes = [member.value for member in Accuracy]
    if accuracy and accuracy not in classes:
        raise ConfigurationError(
            f"{ACCURACY_VARIABLE} must be one of {', '.join(classes)}, found {accuracy!r}"
        )
    return Policy(
        only,
        excluded,
        Accuracy(accuracy) if accuracy else Accuracy.EXACT,
        BACKEND_VARIABLE if backends else "default",
    )
