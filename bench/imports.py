"""Seconds and memory of the imports: ``python -m bench import``, with or without a GPU.

Each figure is a fresh process: bare Python, torch alone, ``import fp8dispatch``, and the first
touch of `fp8_linear`, which loads torch and looks at the machine. Peak memory is that of the
process (``ru_maxrss``). The order of the processes alternates; figures are medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from bench.session import Point, Row, Session

RUNS = 3
STEPS = {
    "python": "",
    "torch": "import torch",
    "fp8dispatch": "import fp8dispatch",
    "fp8_linear": "import fp8dispatch\nfp8dispatch.fp8_linear",
    "fp8_linear after torch": "import fp8dispatch\nfp8dispatch.fp8_linear",
}
BEFORE = {"fp8_linear after torch": "import torch"}
CHILD = """
import json, resource, sys, time
before, code = sys.argv[1:]
exec(before)
start = time.perf_counter()
exec(code)
seconds = time.perf_counter() - start
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
heavy = [name for name in ("torch", "triton", "pynvml", "numpy") if name in sys.modules]
print(json.dumps([seconds, peak, heavy]))
"""


def points(_: Session) -> Iterator[Point]:
    """One point: all processes in turns."""
    yield "imports", partial(measure, RUNS)


def measure(runs: int) -> Row:
    """Median seconds and peak bytes of each step, and which heavy modules it loads."""
    found: dict[str, list[tuple[float, int, list[str]]]] = {name: [] for name in STEPS}
    for number in range(runs + 1):
        for name in STEPS if number % 2 == 0 else reversed(STEPS):
            if number:
                found[name].append(_child(name))
            else:
                _child(name)  # so that every file is in the page cache
    return {
        "runs": runs,
        "seconds": {
            name: round(statistics.median(one[0] for one in all_), 4)
            for name, all_ in found.items()
        },
        "spread_seconds": {
            name: round(max(one[0] for one in all_) - min(one[0] for one in all_), 4)
            for name, all_ in found.items()
        },
        "peak_bytes": {
            name: int(statistics.median(one[1] for one in all_)) for name, all_ in found.items()
        },
        "loads": {name: all_[0][2] for name, all_ in found.items()},
    }


def _child(name: str) -> tuple[float, int, list[str]]:
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, BEFORE.get(name, ""), STEPS[name]],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    seconds, peak, heavy = json.loads(ran.stdout)
    return seconds, peak, heavy
