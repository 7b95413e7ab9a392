"""`use_backend` and `set_backend`: state which backends may run, for a block or for the process."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import Token
from types import TracebackType
from typing import Any, TypeVar, cast

from fp8dispatch import policy, registry
from fp8dispatch.errors import ConfigurationError, UnknownBackendError
from fp8dispatch.policy import Statement
from fp8dispatch.problem import Accuracy, Dgrad

F = TypeVar("F", bound=Callable[..., Any])


class use_backend:  # lower case: reads as a verb where it is used, like torch.no_grad
    """State backends, accuracy, batch invariance or dgrad for calls in a block or a function.

    It holds in this thread or asynchronous task, and the nearest one wins. Backward runs what the
    forward call was allowed to run, wherever it runs. Activation checkpointing calls the function
    again, later and on another thread, outside of any block: decorate the function that is
    checkpointed, and the statement is made again with each call of it.

        with fp8dispatch.use_backend("triton"): ...

        @fp8dispatch.use_backend("-cublaslt", accuracy="fast")
        def step(): ...

    Args:
        backends: a statement such as "triton", "triton,eager" or "-cublaslt"; None leaves it.
        accuracy: "exact" or "fast"; None leaves it.
        batch_invariant: True lets only backends run that compute a row alike, bit for bit, whatever
            other rows stand beside it and however many; None leaves it.
        dgrad: "dequantized" computes the gradient of X with the dequantised weight; "fp8"
            quantises the output's gradient and multiplies it with the FP8 weight as it is, or the
            forward call raises (`fp8dispatch.dgrad`); None leaves it.

    Raises:
        UnknownBackendError, ConfigurationError: a statement that cannot be read.
    """

    def __init__(
        self,
        backends: str | None = None,
        *,
        accuracy: str | Accuracy | None = None,
        batch_invariant: bool | None = None,
        dgrad: str | Dgrad | None = None,
    ) -> None:
        self._statement = _statement(backends, accuracy, batch_invariant, dgrad)
        self._tokens: list[Token[Statement | None]] = []

    def __enter__(self) -> use_backend:
        self._tokens.append(policy.enter(self._statement))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        policy.leave(self._tokens.pop())

    def __call__(self, function: F) -> F:
        def fresh() -> use_backend:
            said = self._statement
            return use_backend(
                said.backends,
                accuracy=said.accuracy,
                batch_invariant=said.batch_invariant,
                dgrad=said.dgrad,
            )

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def asynchronous(*args: Any, **kwargs: Any) -> Any:
                with fresh():
                    return await function(*args, **kwargs)

            return cast("F", asynchronous)

        @functools.wraps(function)
        def synchronous(*args: Any, **kwargs: Any) -> Any:
            with fresh():
                return function(*args, **kwargs)

        return cast("F", synchronous)


def set_backend(
    backends: str | None = None,
    *,
    accuracy: str | Accuracy | None = None,
    batch_invariant: bool | None = None,
    dgrad: str | Dgrad | None = None,
) -> None:
    """State backends, accuracy and the rest for the process; without arguments, unstate.

    Args:
        backends: a statement such as "triton", "triton,eager" or "-cublaslt"; None for none.
        accuracy: "exact" or "fast"; None for none.
        batch_invariant, dgrad: as in `use_backend`; None for none.

    Raises:
        UnknownBackendError, ConfigurationError: a statement that cannot be read.
    """
    policy.state_for_process(_statement(backends, accuracy, batch_invariant, dgrad))


def _statement(
    backends: str | None,
    accuracy: str | Accuracy | None,
    batch_invariant: bool | None,
    dgrad: str | Dgrad | None,
) -> Statement:
    if backends is not None:
        if not isinstance(backends, str) or not backends.strip():
            raise UnknownBackendError(
                f"backends must be a text such as 'triton' or '-cublaslt', found {backends!r}"
            )
        policy.parse_backends(backends, registry.NAMES)
    if batch_invariant not in (True, False, None):
        raise ConfigurationError(
            f"batch_invariant must be True, False or None, found {batch_invariant!r}"
        )
    parsed = None if accuracy is None else policy.parse_accuracy(accuracy, "accuracy")
    way = None if dgrad is None else policy.parse_dgrad(dgrad, "dgrad")
    return Statement(backends, parsed, batch_invariant, way)
