"""The command ``fp8dispatch``: each subcommand is a module with `add_arguments` and `run`.

Only the module of the subcommand that was asked for is imported, so that none waits for what
another needs. Exit codes of every command: 0 ok, 1 a check failed, 2 usage, 3 no GPU, 4 wrong
numbers, 5 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": (
        "fp8dispatch.doctor.__main__",
        "what this machine can run, what it would choose and why",
    ),
    "tune": (
        "fp8dispatch.tuning.command",
        "time the backends on this GPU and route calls to the fastest",
    ),
    "calibrate": (
        "fp8dispatch.calibrate.command",
        "measure the inputs of a model's layers on a text, for static scales",
    ),
    "plan": (
        "fp8dispatch.pack.commands.plan",
        "what packing a checkpoint to FP8 would do, and where the result would load",
    ),
    "pack": (
        "fp8dispatch.pack.commands.pack",
        "quantise a checkpoint to FP8 on the CPU",
    ),
    "unpack": (
        "fp8dispatch.pack.commands.unpack",
        "a packed checkpoint back to bf16, fp16 or fp32",
    ),
    "convert": (
        "fp8dispatch.pack.commands.convert",
        "a packed checkpoint into another format, number by number the same",
    ),
    "inspect": (
        "fp8dispatch.pack.commands.inspect",
        "what is in a packed checkpoint: format, scales, codes",
    ),
    "verify": (
        "fp8dispatch.pack.commands.verify",
        "check a packed checkpoint, and how well it restores its source",
    ),
}
"""Subcommand -> its module, which has `add_arguments(parser)` and `run(arguments) -> exit code`
and whose docstring is the command's description; and its line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="fp8dispatch", description="FP8 linear layers.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in given if not word.startswith("-")), None)
    for name, (module_name, help_line) in COMMANDS.items():
        if name != asked:
            commands.add_parser(name, help=help_line)
            continue
        module = import_module(module_name)
        command = commands.add_parser(
            name,
            help=help_line,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(given)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
