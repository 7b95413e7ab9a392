"""``python -m bench SUITE [OUT] [flags]``, ``python -m bench TOOL ...``, or ``--list``.

A suite writes one JSON file, by default ``bench/results/<gpu or cpu>-<suite>.json``. Without a GPU
the suites for one are rehearsed on the CPU, tiny, into a file that says so and is no result.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch

from bench.arms import RECIPES
from bench.session import Budget, make_session, run
from bench.suites import SUITES, TOOLS

RESULTS = Path(__file__).parent / "results"


def main(argv: list[str]) -> int:
    """Run a suite or a tool; returns its exit code."""
    if argv[:1] == ["--list"]:
        print(listing())
        return 0
    if argv and argv[0] in TOOLS:
        code: int = import_module(TOOLS[argv[0]][0]).main(argv[1:])
        return code
    arguments = _parser().parse_args(argv)
    name, suite = arguments.suite, SUITES[arguments.suite]
    module = import_module(suite.module)
    out = arguments.out or default_out(name, arguments.device)
    if not hasattr(module, "points"):
        return module.main(out) or 0
    session = make_session(
        arguments.device,
        grid=arguments.grid,
        recipes=tuple(arguments.recipes.split(",")),
        backends=tuple(arguments.backends.split(",")) if arguments.backends else None,
        parts=tuple(arguments.parts),
        rounds=arguments.rounds,
    )
    budget = Budget(arguments.budget or suite.seconds)
    return run(
        name,
        module.points(session),
        out,
        session,
        budget,
        summary=getattr(module, "summary", None),
        hang_seconds=getattr(module, "HANG_SECONDS", 240.0),
    )


def default_out(name: str, device: str | None = None) -> str:
    """Where the result of a suite belongs; of a rehearsal, a temporary file."""
    suite = SUITES[name]
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if suite.where == "gpu" and not on_gpu:
        return str(Path(tempfile.mkdtemp(prefix="fp8dispatch-rehearsal-")) / f"{name}.json")
    prefix = "cpu"
    if on_gpu and suite.where != "cpu":
        prefix = torch.cuda.get_device_name().split()[1].lower()  # "NVIDIA H200" -> "h200"
    return str(RESULTS / f"{prefix}-{name}.json")


def listing() -> str:
    """All suites and tools, a line each."""
    lines = [
        f"{name:16} {suite.where:4} {suite.summary}"
        + (f" (at most {suite.seconds:g} s)" if suite.seconds else "")
        for name, suite in SUITES.items()
    ]
    return "\n".join([*lines, "", *(f"{name:16}      {text}" for name, (_, text) in TOOLS.items())])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=SUITES, metavar="SUITE")
    parser.add_argument("out", nargs="?", help="result file")
    parser.add_argument("--budget", type=float, default=0, help="seconds; begin nothing after")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: a tiny rehearsal")
    parser.add_argument("--grid", choices=("grid", "models", "all", "tiny"), default="all")
    parser.add_argument("--recipes", default="block,row", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--backends", default="", help="names with commas; default all")
    parser.add_argument("--parts", nargs="*", default=[], help="parts of the suite; default all")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each arm; default 3")
    return parser


if __name__ == "__main__":
    # The orders that this machine's user has tuned are not what is measured.
    os.environ.setdefault("FP8DISPATCH_TUNED", "0")
    sys.exit(main(sys.argv[1:]))
