"""Write a packed checkpoint in another format without changing a single number.

Codes are copied, scales renamed and reshaped. What would need other codes or scales is refused,
with the reason. Exit codes: 0 done, 1 refused or damaged, 2 usage, 5 interrupted: the same command
goes on from there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from fp8dispatch.pack.commands.common import EXIT_OK, guarded, output, print_json, progress_bar
from fp8dispatch.pack.commands.unpack import add_output_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", metavar="PACKED", help="a packed checkpoint")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--format",
        required=True,
        metavar="NAME",
        help="compressed-tensors (ct), hf, modelopt, fbgemm or native",
    )
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns the exit code."""

    def work() -> int:
        from fp8dispatch.pack.convert import convert
        from fp8dispatch.pack.layouts.catalog import get_layout

        warning = get_layout(arguments.format).warning
        with progress_bar("converting") as step:
            done = convert(
                arguments.source,
                arguments.out,
                arguments.format,
                resume=not arguments.no_resume,
                force=arguments.force,
                progress=step,
            )
        if arguments.json:
            print_json(json.dumps({**asdict(done), "warning": warning}, indent=2))
            return EXIT_OK
        console = output()
        console.print(f"{arguments.out}: {done.modules} modules, {done.source} -> {done.target}")
        for note in (*done.notes, *([warning] if warning else [])):
            console.print(f"note: {note}")
        return EXIT_OK

    return guarded(work, "interrupted; the same command goes on from here")
