"""Turn a packed checkpoint of any format back into bf16, fp16 or fp32, on the CPU.

Weights become codes * scale, rounded once; everything else is copied. Memory stays bounded by a
strip of one weight. Exit codes: 0 done, 1 the checkpoint is damaged or not packed, 2 usage,
5 interrupted: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from fp8dispatch.pack.commands.common import EXIT_OK, guarded, output, print_json, progress_bar

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", metavar="PACKED", help="a packed checkpoint")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the restored weights")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that writes a checkpoint."""
    parser.add_argument(
        "--no-resume", action="store_true", help="begin again instead of going on after a kill"
    )
    parser.add_argument("--force", action="store_true", help="replace what is in OUT")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Unpack; returns the exit code."""

    def work() -> int:
        import torch

        from fp8dispatch.pack.unpack import unpack

        with progress_bar("unpacking") as step:
            done = unpack(
                arguments.source,
                arguments.out,
                dtype=getattr(torch, DTYPES[arguments.dtype]),
                resume=not arguments.no_resume,
                force=arguments.force,
                progress=step,
            )
        if arguments.json:
            print_json(json.dumps(asdict(done), indent=2))
            return EXIT_OK
        console = output()
        console.print(
            f"{arguments.out}: {done.modules} weights of {done.layout} restored to "
            f"{arguments.dtype}, {done.bytes_before:,} -> {done.bytes_after:,} bytes"
        )
        if done.dropped:
            console.print(f"left out: {len(done.dropped)} scales of the KV cache")
        return EXIT_OK

    return guarded(work, "interrupted; the same command goes on from here")
