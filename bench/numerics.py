"""How close the backends come to the truth: ``python -m bench.numerics OUT.json [NAME,NAME...]``.

Runs the matrix of the tests (`tests.matrix`) and keeps, for each backend, recipe and output
dtype: calls that ran, the lowest signal-to-noise ratios of a row (output, dX), the largest error
as a share of the per-element bound, and each refusal sentence with the number of calls it met.
FBGEMM and MSLK take a process each. Of what TorchAO would time for minutes a part is run.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch

from bench import environment
from fp8dispatch import registry
from tests import matrix


def main(path: str, names: tuple[str, ...]) -> None:
    """Run the matrix on the GPU and write what came out."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    refusals: Counter[str] = Counter()
    for backend in names:
        for recipe in matrix.RECIPES:
            bench = matrix.Bench("cuda")
            torch.manual_seed(0)
            for case in matrix.cases(backend, recipe):
                if not matrix.affordable(case):
                    continue
                outcome = bench.run(case)
                if outcome.refusal is not None:
                    refusals[_reason(outcome.refusal, backend)] += 1
                    continue
                dtype = str(case.out_dtype).removeprefix("torch.")
                row = rows.setdefault(
                    (backend, recipe, dtype),
                    {"calls": 0, "sqnr_db": 999.0, "grad_sqnr_db": 999.0, "bound_used": 0.0},
                )
                row["calls"] += 1
                row["sqnr_db"] = round(min(row["sqnr_db"], outcome.sqnr), 1)
                row["grad_sqnr_db"] = round(min(row["grad_sqnr_db"], outcome.grad_sqnr), 1)
                row["bound_used"] = round(max(row["bound_used"], outcome.bound_used), 3)
    table = [
        {"backend": b, "recipe": r, "out_dtype": d, **values} for (b, r, d), values in rows.items()
    ]
    for row in table:
        print(" ".join(f"{value!s:>14}" for value in row.values()))
    for reason, count in refusals.most_common():
        print(f"{count:5d} x {reason}")
    environment.write(path, {"numerics": table, "refusals": dict(refusals.most_common())})


def _reason(sentence: str, backend: str) -> str:
    """The refusals of a sentence without the call they were about."""
    return f"{backend} " + sentence.split(f": {backend} ", 1)[1] if ": " in sentence else sentence


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m bench.numerics OUT.json [NAME,NAME...]")
    main(sys.argv[1], registry.NAMES if len(sys.argv) == 2 else tuple(sys.argv[2].split(",")))
