"""What the backends over other people's libraries share.

A library is found by its metadata, imported at its first use and never before, and its failure to
import is kept as a refusal. What these libraries do not check themselves is checked here: calls
that they would get wrong are refused. `compute.operands` brings the others into their layouts.
"""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fp8dispatch.backends.contract import Backend
from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.failures import is_out_of_memory
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128, Granularity, Recipe

if TYPE_CHECKING:
    import torch

GROUP = 128
_MAX_ELEMENTS = 2**31

# What an import of compiled code raises when something around it is missing or does not fit.
_IMPORT_FAILURES = (
    ImportError,
    OSError,
    RuntimeError,
    AssertionError,
    AttributeError,
    TypeError,
    ValueError,
    SyntaxError,  # code for another Python; also a SyntaxWarning where warnings are errors
    Warning,
)


class LibraryBackend(Backend):
    """A backend whose computation is an optional library's.

    FP8 e4m3fn weights and bf16 output, as all of these libraries have it.
    """

    weight_dtypes = frozenset({"float8_e4m3fn"})
    out_dtypes = frozenset({"bfloat16"})
    needs_to_load: str
    """What must be there for the import to work, worded to follow "needs"."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._load_refusals: tuple[Refusal, ...] | None = None

    @abstractmethod
    def _load(self) -> tuple[Refusal, ...]:
        """Import the library and keep its entry points; say why they cannot be used.

        Raises:
            Exception: whatever the import raises; it becomes a refusal.
        """

    def _refuse_entry(self, recipe: Recipe) -> tuple[Refusal, ...]:
        """Why the loaded library has no entry point for a recipe; empty when it has."""
        return ()

    def loadable(self, recipe: Recipe) -> tuple[Refusal, ...]:
        """Import the library (seconds, the first time) and say why it cannot compute a recipe.

        Asked where `refuse_machine` and `refuse_problem` refuse nothing. The answer of the import
        holds for the life of the process.
        """
        return self.imported() or self._refuse_entry(recipe)

    def imported(self) -> tuple[Refusal, ...]:
        """Import the library and say why that fails, whatever is to be computed."""
        if self._load_refusals is None:
            with self._lock:
                if self._load_refusals is None:
                    self._load_refusals = self._attempt()
        return self._load_refusals

    def _attempt(self) -> tuple[Refusal, ...]:
        try:
            with _root_logger_left_alone():
                return self._load()
        except _IMPORT_FAILURES as error:
            if is_out_of_memory(error):
                raise
            return (Refusal("import", self.needs_to_load, first_line(error)),)


def first_line(error: BaseException) -> str:
    """An exception as one line: its type, the first line that it says, and the same of its cause.

    Torch says which library it could not load, and the dynamic loader, its cause, says why.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"
    return told if error.__cause__ is None else f"{told} ({first_line(error.__cause__)})"


@contextmanager
def _root_logger_left_alone() -> Iterator[None]:
    """Keep `logging.warning` and the like, called during an import, from configuring logging.

    They install a handler on the root logger where it has none, and with it change what the
    application prints ever after.
    """
    root = logging.getLogger()
    placeholder = logging.NullHandler()
    root.addHandler(placeholder)
    try:
        yield
    finally:
        root.removeHandler(placeholder)


class Warmed:
    """Remembers which calls have run once, where a first call compiles or times kernels.

    A first call holds a lock, so that two threads neither initialise a library at once nor time
    kernels against each other; while a CUDA graph is captured it is refused.

    Args:
        name: the backend's name.
        doing: what a first call does, worded to follow "the first one".
        limit: how many calls are remembered, so that a server's memory stays flat.
    """

    def __init__(self, name: str, doing: str, limit: int = 4096) -> None:
        self._name = name
        self._doing = doing
        self._limit = limit
        self._keys: set[Hashable] = set()
        self._lock = threading.Lock()

    def run(
        self, key: Hashable, device: torch.device, call: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """``call()`` on its device, which is remembered under `key`.

        Raises:
            BackendUnavailableError: a graph is being captured and `key` has never run.
        """
        if (device, key) in self._keys:
            return call()
        import torch  # by a first call alone: the others have returned

        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise BackendUnavailableError(
                f"{self._name} needs a call of this size before CUDA graph capture, found none: "
                f"the first one {self._doing}; run the call once outside the graph"
            )
        with self._lock:
            result = call()
            if len(self._keys) >= self._limit:
                self._keys.clear()
            self._keys.add((device, key))
        return result


def refuse_operands(problem: LinearProblem, *, contiguous: bool = False) -> list[Refusal]:
    """Refusals of the weight's layout and of sizes beyond 32-bit offsets.

    Args:
        contiguous: rows with gaps are refused as well; a copy in each call would be hidden work.
    """
    refusals: list[Refusal] = []
    if not problem.weight_row_major:
        refusals.append(Refusal("layout", "a row-major weight [N, K]", "other strides"))
    elif contiguous and not problem.weight_contiguous:
        need = "a contiguous weight (make it contiguous once)"
        refusals.append(Refusal("contiguous", need, "gaps between its rows"))
    if not problem.aligned:
        refusals.append(Refusal("alignment", "weight memory aligned to 16 bytes", "an odd address"))
    for what, size in (
        ("M x K", problem.m * problem.k),
        ("N x K", problem.n * problem.k),
        ("M x N", problem.m * problem.n),
    ):
        if size >= _MAX_ELEMENTS:
            refusals.append(
                Refusal("size", f"{what} below 2**31 elements (32-bit offsets)", f"{size}")
            )
    return refusals


def refuse_block(problem: LinearProblem) -> list[Refusal]:
    """Refusals of a block GEMM that knows 128x128 blocks, writes bf16 and adds no bias."""
    refusals: list[Refusal] = []
    if problem.recipe.granularity is not Granularity.BLOCK:
        return refusals
    if problem.recipe != BLOCK_128:
        refusals.append(Refusal("block-size", "blocks 128x128", str(problem.recipe)))
    if problem.has_bias:
        refusals.append(
            Refusal(
                "bias",
                "no bias with block scales (added to its bfloat16 product it would be rounded "
                "twice: use a backend that fuses it, or add it outside)",
                "one",
            )
        )
    return refusals
