"""Look into a packed checkpoint: its format, its schemes, its scales, NaN and zero codes.

Exit codes: 0 shown, 1 the checkpoint is damaged or not packed, 2 usage, 5 interrupted.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fp8dispatch.pack.commands.common import EXIT_OK, guarded, output, print_json, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from fp8dispatch.pack.examine import ModuleFacts
    from fp8dispatch.pack.inspection import Inspection

_BAR = 40
_ROWS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", metavar="PACKED", help="a packed checkpoint")
    parser.add_argument("tensor", nargs="?", metavar="TENSOR", help="only this module or tensor")
    parser.add_argument("--all", action="store_true", help=f"list more than {_ROWS} modules")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Inspect; returns the exit code."""

    def work() -> int:
        from fp8dispatch.pack.inspection import inspect

        with progress_bar("reading") as step:
            found = inspect(arguments.source, arguments.tensor, progress=step)
        if arguments.json:
            print_json(found.model_dump_json(indent=2))
        else:
            rows = len(found.modules) if arguments.all else _ROWS
            _show(found, output(), rows)
        return EXIT_OK

    return guarded(work)


def _show(found: Inspection, console: Console, rows: int) -> None:
    from rich.table import Table

    console.print(f"format: {found.layout}")
    for scheme, count in found.schemes.items():
        console.print(f"scheme: {scheme} ({count} modules)")
    if found.kv_layers:
        heads = "one per layer" if found.kv_heads is None else f"{found.kv_heads} per layer"
        console.print(f"KV scales: {found.kv_layers} layers, {heads}")
    if found.skipped:
        console.print(f"left alone: {', '.join(found.skipped[:8])}{_more(found.skipped, 8)}")
    table = Table("module", "shape", "scales", "smallest", "largest", "zero codes", "bad")
    for fact in found.modules[:rows]:
        table.add_row(*_row(fact))
    console.print(table, soft_wrap=False)
    if len(found.modules) > rows:
        console.print(f"{len(found.modules) - rows} more modules: --all lists them")
    console.print("scales by power of two:")
    most = max(found.scale_bins.values(), default=1)
    for exponent, count in found.scale_bins.items():
        console.print(f"  2^{exponent:<5d}{'#' * max(1, _BAR * count // most):{_BAR}s} {count}")
    for note in found.notes:
        console.print(f"note: {note}")


def _row(fact: ModuleFacts) -> tuple[str, ...]:
    none = "-"
    return (
        fact.name,
        f"{fact.shape[0]}x{fact.shape[1]}",
        f"{fact.scales} {fact.scale_dtype}",
        none if fact.scale_min is None else f"{fact.scale_min:.3g}",
        none if fact.scale_max is None else f"{fact.scale_max:.3g}",
        f"{100 * fact.zero_codes:.2f} %",
        str(fact.bad_scales + fact.nonfinite_codes),
    )


def _more(names: list[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""
