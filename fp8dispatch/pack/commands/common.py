"""What the commands on checkpoints share: exit codes, errors as one line, progress, output."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fp8dispatch.errors import CheckpointError, InvalidInputError, NumericalOverflowError

EXIT_OK, EXIT_CHECK_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 5

_PLAIN_WIDTH = 110  # of what is no terminal, unless COLUMNS says otherwise

OnStep = Callable[[int, int, str], None]
"""Called with (done, of, name) before each step."""


def guarded(work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command; an error of ours becomes one line on stderr and an exit code.

    Args:
        work: does everything and returns the exit code.
        interrupted: what to say after Ctrl-C.
    """
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        return work()
    except (CheckpointError, NumericalOverflowError) as error:
        errors.print(f"error: {error}")
        return EXIT_CHECK_FAILED
    except InvalidInputError as error:
        errors.print(f"error: {error}")
        return EXIT_USAGE
    except KeyboardInterrupt:
        errors.print(interrupted)
        return EXIT_INTERRUPTED


def output() -> Console:
    """Where a command prints its result: lines unwrapped, tables as wide as the terminal."""
    columns = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns
    return Console(width=max(60, columns), highlight=False, markup=False, soft_wrap=True)


def print_json(text: str) -> None:
    """Print a result as JSON, unwrapped."""
    sys.stdout.write(text + "\n")


@contextmanager
def progress_bar(what: str) -> Iterator[OnStep]:
    """A bar on stderr while it is a terminal; silent otherwise."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)

        def step(done: int, of: int, name: str) -> None:
            bar.update(task, completed=done, total=of, description=f"{what} {name[-50:]}")

        yield step
