"""Quantise a checkpoint to FP8 on the CPU, with bounded memory; a kill loses no finished file.

The plan is printed before anything is written. Without flags: channel scales in the
compressed-tensors format, which loads everywhere. Exit codes: 0 done, 1 the plan has problems or
the source is damaged, 2 usage, 5 interrupted: the same command goes on from there.
"""

from __future__ import annotations

import argparse

from fp8dispatch.pack.commands.common import (
    EXIT_CHECK_FAILED,
    EXIT_OK,
    guarded,
    output,
    print_json,
    progress_bar,
)
from fp8dispatch.pack.commands.plan import add_option_arguments, options_of
from fp8dispatch.pack.commands.unpack import add_output_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", metavar="MODEL", help="a folder, a file or a hub cache folder")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    add_option_arguments(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="threads; default one per core")
    parser.add_argument(
        "--report", metavar="PATH", help="where the report goes; default OUT/fp8_report.json"
    )
    parser.add_argument("--no-report", action="store_true", help="measure nothing, which is faster")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Pack; returns the exit code."""

    def work() -> int:
        from fp8dispatch.errors import InvalidInputError
        from fp8dispatch.pack.packing import carry_out
        from fp8dispatch.pack.plan import plan_checkpoint
        from fp8dispatch.pack.summary import PlanSummary, render

        if arguments.report is not None and arguments.no_report:
            raise InvalidInputError(
                "--report PATH and --no-report exclude each other, found both; drop one"
            )
        planned = plan_checkpoint(arguments.source, options_of(arguments))
        summary = PlanSummary.of(planned)
        if not arguments.json:
            render(summary, output())
        elif arguments.dry_run or planned.problems:
            print_json(summary.model_dump_json(indent=2))
        if arguments.dry_run or planned.problems:
            return EXIT_CHECK_FAILED if planned.problems else EXIT_OK
        with progress_bar("packing") as step:
            packed = carry_out(
                planned,
                arguments.out,
                workers=arguments.workers,
                report=not arguments.no_report if arguments.report is None else arguments.report,
                resume=not arguments.no_resume,
                force=arguments.force,
                progress=step,
            )
        if arguments.json:
            print_json(packed.summary().model_dump_json(indent=2))
            return EXIT_OK
        console = output()
        how = "resumed and finished" if packed.resumed else "packed"
        console.print(f"{arguments.out}: {how}, {len(planned.weights)} weights quantised")
        if packed.report is not None:
            totals = packed.report.totals
            overall = "no loss" if totals.sqnr_db is None else f"{totals.sqnr_db:.2f} dB SQNR"
            console.print(f"{overall} over all weights; see {packed.report_files[0]}")
            if totals.suspicious:
                console.print(
                    f"warning: {len(totals.suspicious)} weights are far less exact than FP8 is, "
                    f"such as {totals.suspicious[0]}; see the report"
                )
        for note in packed.notes:
            console.print(f"note: {note}")
        return EXIT_OK

    return guarded(work, "interrupted; the same command goes on from here")
