"""Time the backends on this GPU and route calls of these sizes to the fastest from now on.

Each of --shapes is M,N,K, or N,K, or the config.json of a Transformers model (or its folder), whose
linear layers are measured. Every backend that may run a size is checked against float64 first, and
the whole call is timed as eager inference makes it; `triton` also with other tiles than its own
choice, which must give the same bits. The results hold for this GPU, driver and these versions;
`fp8dispatch doctor` shows them, `fp8dispatch doctor --clear-cache` drops them and
FP8DISPATCH_TUNED=0 turns them off. Progress is a bar on a terminal and JSON lines elsewhere, on
stderr.

Exit codes: 0 ok, 1 nothing could be measured at some size, 2 usage, 3 no GPU, 4 a backend computed
wrong numbers (it is not chosen), 5 interrupted (what was measured is kept).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fp8dispatch.errors import BackendUnavailableError, FP8DispatchError, InvalidInputError

if TYPE_CHECKING:
    from fp8dispatch.tuning.measure import Point
    from fp8dispatch.tuning.run import OnStep, TuningReport

EXIT_OK, EXIT_CHECK_FAILED, EXIT_USAGE, EXIT_NO_GPU, EXIT_WRONG, EXIT_INTERRUPTED = range(6)

_PLAIN_WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fp8dispatch tune``."""
    parser.add_argument(
        "--shapes",
        nargs="+",
        required=True,
        metavar="SHAPE",
        help="M,N,K or N,K or a model's config.json (or its folder), any number of them",
    )
    parser.add_argument(
        "--recipe",
        default="block",
        metavar="R",
        help="tensor, row, block (128x128, the default) or block:BNxBK",
    )
    parser.add_argument(
        "--tokens",
        metavar="M,M,...",
        help="M of shapes that do not say it (1,4,16,64,256,1024,4096)",
    )
    parser.add_argument(
        "--backends",
        metavar="B",
        help="time these alone, or, as in --backends=-torchao, all but these",
    )
    parser.add_argument("--device", metavar="D", help="cuda:N (the current GPU by default), or cpu")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Tune as the arguments ask for; returns the exit code."""
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        return _tune(arguments, errors)
    except BackendUnavailableError as error:
        errors.print(str(error))
        return EXIT_CHECK_FAILED
    except FP8DispatchError as error:
        errors.print(str(error))
        return EXIT_USAGE
    except KeyboardInterrupt:
        errors.print("interrupted; the sizes measured so far are kept and in force")
        return EXIT_INTERRUPTED


def _tune(arguments: argparse.Namespace, errors: Console) -> int:
    from fp8dispatch.doctor.__main__ import parse_recipe

    recipe = parse_recipe(arguments.recipe)
    asked = None if arguments.tokens is None else parse_tokens(arguments.tokens)
    # Torch takes seconds to import: not before the arguments have been read.
    import torch

    from fp8dispatch.tuning.run import TOKENS, run_tuning
    from fp8dispatch.tuning.shapes import parse_shapes

    tokens = TOKENS if asked is None else asked
    parse_shapes(arguments.shapes, tokens)  # a config that cannot be read needs no GPU to say so
    if arguments.device != "cpu" and not torch.cuda.is_available():
        errors.print("tune needs a CUDA GPU to measure on, torch finds none")
        return EXIT_NO_GPU
    with _progress(errors) as on_step:
        report = run_tuning(
            arguments.shapes, recipe, tokens, arguments.backends, arguments.device, None, on_step
        )
    if arguments.json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        _print(report)
    if report.wrong:
        return EXIT_WRONG
    return EXIT_OK if all(point.order for point in report.points) else EXIT_CHECK_FAILED


def parse_tokens(text: str) -> tuple[int, ...]:
    """The numbers of ``--tokens``.

    Raises:
        InvalidInputError: what is no list of integers.
    """
    if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", text):
        raise InvalidInputError(
            f"--tokens must be integers with commas between them, such as 1,16,256, found {text!r}"
        )
    return tuple(int(part) for part in text.split(","))


def _print(report: TuningReport) -> None:
    columns = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns
    console = Console(width=max(60, columns), highlight=False, markup=False)
    table = Table(title=f"{report.machine}, whole calls in microseconds", title_justify="left")
    for heading in ("M", "N", "K", "recipe", "fastest", "us", "before", "us", "gain"):
        words = heading in ("recipe", "fastest", "before")
        table.add_column(heading, justify="left" if words else "right")
    for point in report.points:
        table.add_row(*_row(point))
    console.print(table)
    reasons = {
        f"{arm.name}, {arm.state}: {arm.reason}": None
        for point in report.points
        for arm in point.arms
        if arm.state in ("wrong", "failed")
    }
    for reason in reasons:
        console.print(reason, soft_wrap=True)
    where = "this process alone" if report.file is None else str(report.file)
    console.print(f"kept in: {where}", soft_wrap=True)


def _row(point: Point) -> tuple[str, ...]:
    from fp8dispatch.tuning.measure import named

    size = tuple(str(value) for value in (point.size.m, point.size.n, point.size.k))
    if not point.order or point.before is None or point.us_before is None:
        return (*size, str(point.recipe), "none", "", "", "", "")
    fastest = point.order[0]
    now, before = point.us[fastest], point.us_before
    return (
        *size,
        str(point.recipe),
        named(fastest, point.tiles.get(fastest)),
        f"{now:.1f}",
        point.before,
        f"{before:.1f}",
        f"{before / now:.2f}" if now else "",
    )


@contextmanager
def _progress(errors: Console) -> Iterator[OnStep]:
    """A bar on a terminal, a JSON line for each step elsewhere."""
    from fp8dispatch.tuning.run import bar_on

    if errors.is_terminal:
        with bar_on(errors) as on_step:
            yield on_step
        return

    def line(done: int, of: int, what: str) -> None:
        event = {"event": "progress", "done": done, "of": of, "next": what}
        sys.stderr.write(json.dumps(event) + "\n")
        sys.stderr.flush()

    yield line
