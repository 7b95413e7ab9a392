"""The command ``fp8dispatch``; each subcommand is a module that also runs by itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fp8dispatch.doctor import __main__ as doctor


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code."""
    parser = argparse.ArgumentParser(prog="fp8dispatch", description="FP8 linear layers.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "doctor",
        help="what this machine can run, what it would choose and why",
        description=doctor.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_arguments(command)
    command.set_defaults(run=doctor.run)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
