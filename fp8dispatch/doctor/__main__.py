"""What this machine can run, what it would choose and why.

Exit codes: 0 healthy (a refusal that is to be expected is healthy), 1 degraded, 2 usage, 3 no GPU,
4 broken (a backend computes wrong numbers), 5 interrupted. Without --probe no CUDA context is made,
neither torch nor any library is imported, and verdicts are those that are stored.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from fp8dispatch.errors import InvalidInputError
from fp8dispatch.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8dispatch.doctor.questions import Call

EXIT_USAGE, EXIT_INTERRUPTED = 2, 5

_PLAIN_WIDTH = 110  # of what is no terminal, unless COLUMNS says otherwise
_NARROWEST = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The doctor's arguments, for its own command and for ``fp8dispatch doctor``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="import torch and test the numbers of every backend that can run, which starts CUDA",
    )
    parser.add_argument("--shape", metavar="M,N,K", help="explain one call; needs --recipe")
    parser.add_argument(
        "--recipe", metavar="R", help="of --shape: tensor, row, block (128x128) or block:BNxBK"
    )
    parser.add_argument(
        "--experts", type=int, metavar="E", help="--shape is an expert matmul of weights [E, N, K]"
    )
    parser.add_argument(
        "--batched", action="store_true", help="each row of it names its expert; else sorted rows"
    )
    parser.add_argument("--machine", metavar="NAME", help="decide for another GPU, such as h100")
    parser.add_argument("--device", type=int, metavar="N", help="ask about one GPU")
    parser.add_argument(
        "--clear-cache", action="store_true", help="delete stored verdicts and tuned routes first"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the doctor; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fp8dispatch.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Collect and print what the arguments ask for; returns the exit code."""
    errors = Console(stderr=True)
    try:
        call = parse_call(
            arguments.shape, arguments.recipe, arguments.experts, batched=arguments.batched
        )
        return _report(arguments, call, errors)
    except InvalidInputError as error:
        errors.print(str(error), highlight=False, markup=False, soft_wrap=True)
        return EXIT_USAGE
    except KeyboardInterrupt:
        errors.print("interrupted; verdicts found so far are stored", highlight=False)
        return EXIT_INTERRUPTED


def _report(arguments: argparse.Namespace, call: Call | None, errors: Console) -> int:
    from fp8dispatch.doctor.collect import collect

    with errors.status("asking the machine") as status:  # on a terminal only
        report = collect(
            machine=arguments.machine,
            device=arguments.device,
            call=call,
            probe=arguments.probe,
            clear_cache=arguments.clear_cache,
            on_step=status.update,
        )
    if arguments.json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    else:
        from fp8dispatch.doctor.render import render

        render(report, _console(), only_call=call is not None)
    return report.exit_code


def parse_call(
    shape: str | None, recipe: str | None, experts: int | None = None, *, batched: bool = False
) -> Call | None:
    """The call of ``--shape``, ``--recipe`` and ``--experts``; None where none is given.

    Raises:
        InvalidInputError: one without the other, or what cannot be read.
    """
    from fp8dispatch.doctor.questions import Call

    if experts is None and batched:
        raise InvalidInputError("--batched says how rows of --experts come: add --experts E")
    if experts is not None and shape is None:
        raise InvalidInputError(
            f"--experts {experts} is of --shape M,N,K and --recipe R, found neither: add both"
        )
    if experts is not None and experts < 1:
        raise InvalidInputError(f"--experts must be the number of experts, found {experts}")
    if shape is None and recipe is None:
        return None
    if shape is None or recipe is None:
        given, missing = ("--shape", "--recipe") if recipe is None else ("--recipe", "--shape")
        raise InvalidInputError(
            f"--shape M,N,K and --recipe R go together, found {given} alone: add {missing}"
        )
    found = re.fullmatch(r"\s*(\d{1,18})\s*,\s*(\d{1,18})\s*,\s*(\d{1,18})\s*", shape)
    m, n, k = map(int, found.groups()) if found else (0, 0, 0)
    if n < 1 or k < 1:
        raise InvalidInputError(
            f"--shape must be M,N,K with N and K at least 1, such as 16,4096,7168, found {shape!r}"
        )
    return Call(m, n, k, parse_recipe(recipe), experts, batched)


def parse_recipe(text: str) -> Recipe:
    """A recipe as it is written on the command line.

    Raises:
        InvalidInputError: what cannot be read.
    """
    name, colon, block = text.strip().partition(":")
    if not colon:
        if name not in ("tensor", "row", "block"):
            raise InvalidInputError(
                f"--recipe must be tensor, row, block or block:BNxBK, found {text!r}"
            )
        return Recipe.parse(name)
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", block)
    if name != "block" or found is None:
        raise InvalidInputError(
            f"--recipe must be tensor, row, block or block:BNxBK such as block:1x128, "
            f"found {text!r}"
        )
    return Recipe.parse(name, (int(found[1]), int(found[2])))


def _console() -> Console:
    columns = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns
    return Console(width=max(_NARROWEST, columns), highlight=False)


if __name__ == "__main__":
    sys.exit(main())
