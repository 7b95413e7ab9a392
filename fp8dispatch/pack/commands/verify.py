"""Check a packed checkpoint: its structure, every scale and code; with --against, its accuracy.

Exit codes: 0 sound, 1 a check failed, 2 usage, 5 interrupted.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fp8dispatch.pack.commands.common import (
    EXIT_CHECK_FAILED,
    EXIT_OK,
    guarded,
    output,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from rich.console import Console

    from fp8dispatch.pack.verification import Verification

_WORST = 5
_FAILURES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", metavar="PACKED", help="a packed checkpoint")
    parser.add_argument("--against", metavar="SRC", help="the checkpoint that it was packed from")
    parser.add_argument(
        "--min-sqnr",
        type=float,
        metavar="DB",
        help="decibels that each weight must reach against SRC (28 for E4M3, 22 for E5M2)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify; returns the exit code."""

    def work() -> int:
        from fp8dispatch.pack.verification import verify

        with progress_bar("checking") as step:
            result = verify(
                arguments.source,
                against=arguments.against,
                min_sqnr=arguments.min_sqnr,
                progress=step,
            )
        if arguments.json:
            print_json(result.model_dump_json(indent=2))
        else:
            _show(result, output())
        return EXIT_OK if result.ok else EXIT_CHECK_FAILED

    return guarded(work)


def _show(result: Verification, console: Console) -> None:
    measured = [module for module in result.modules if module.sqnr is not None]
    measured.sort(key=lambda module: module.sqnr or 0.0)
    for module in measured[:_WORST]:
        console.print(f"{module.sqnr:7.2f} dB  {module.name}")
    if len(measured) > _WORST:
        console.print(f"           and {len(measured) - _WORST} better ones")
    for warning in result.warnings:
        console.print(f"warning: {warning}")
    for failure in result.failures[:_FAILURES]:
        console.print(f"failed: {failure}")
    if len(result.failures) > _FAILURES:
        console.print(f"failed: {len(result.failures) - _FAILURES} more")
    verdict = "sound" if result.ok else f"{len(result.failures)} checks failed"
    form = f" ({result.layout})" if result.layout else ""
    console.print(f"{len(result.modules)} modules{form}: {verdict}")
