"""Lets DeepGEMM compile what the grids need: ``python -m bench warm [PROCESSES]``.

It compiles a kernel for most shapes, seconds each, on one core each: several processes first do
what a suite would otherwise wait for, one shape after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

import torch

from bench.arms import Linear
from bench.shapes import DECODE, DECODE_ROWS, points
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.recipe import BLOCK_128

BACKEND = "deepgemm"


def shapes() -> list[tuple[int, int, int]]:
    """Every M, N, K that a suite over linears times, the most work first."""
    found = {(m, weight.n, weight.k) for m, weight in points("all")}
    found |= {(m, weight.n, weight.k) for weight in DECODE for m in DECODE_ROWS}
    return sorted(found, reverse=True)


def _compile(share: int, of: int) -> None:
    for m, n, k in shapes()[share::of]:
        try:
            Linear(m, n, k, BLOCK_128, "cuda").whole(BACKEND)()
        except BackendUnavailableError as refusal:
            print(f"{m}x{n}x{k}: {refusal}")


def main(arguments: list[str]) -> int:
    """Compile in several processes; the machine's cores less two, unless a number is given."""
    if not torch.cuda.is_available():
        print("needs a GPU, torch finds none")
        return 3
    count = int(arguments[0]) if arguments else max((os.cpu_count() or 2) - 2, 1)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_compile, args=(share, count)) for share in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 0 if all(worker.exitcode == 0 for worker in workers) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
