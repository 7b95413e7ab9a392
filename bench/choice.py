"""Times every backend and the automatic choice on the whole linear: ``python -m bench.choice OUT``.

bf16 in, bf16 out, dynamic activations, through `fp8_linear`, in eager and as a CUDA graph. Arms
alternate, L2 is flushed before each timing, data is normally distributed, and a backend is timed on
a shape only after it computed it right. A point is late where the automatic choice costs more than
the best backend by over 5 % and over 2 us: a route in `fp8dispatch/routes.json` with this result as
its evidence mends that. ``python -m bench.plot OUT`` draws it.

DeepGEMM compiles a kernel for most shapes, seconds each; ``python -m bench.choice --compile`` lets
several processes do that first.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench

import fp8dispatch
from bench import environment
from bench.gemm import capture
from fp8dispatch import registry
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.recipe import BLOCK_128, ROW, Recipe
from tests import oracle

WEIGHTS = ((7168, 2048), (4096, 7168), (24576, 1536), (7168, 16384), (8192, 8192), (57344, 8192))
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
RECIPES = (BLOCK_128, ROW)
ROUNDS = 3
SLACK, SLACK_US = 1.05, 2.0
# TorchAO times 48 configurations at the first call of each size: minutes over this grid.
LEFT_OUT = ("eager", "torchao")
# What must be named computes other numbers, and is nothing to choose from.
ARMS = tuple(n for n in registry.NAMES if n not in LEFT_OUT and not registry.load(n).opt_in)


def main(path: str) -> None:
    """Time the grid and write the figures."""
    rows = [_time_point(m, n, k, recipe) for recipe in RECIPES for n, k in WEIGHTS for m in ROWS]
    for kind in ("eager", "graph"):
        late = [row for row in rows if row[kind]["late"]]
        print(f"{kind}: {len(late)} of {len(rows)} points where the choice is late")
    environment.write(path, {"choice": rows})


def _time_point(m: int, n: int, k: int, recipe: Recipe) -> dict[str, Any]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    weight, scale = fp8dispatch.quantize(dense, recipe)
    checked, columns = min(m, 64), min(n, 1024)
    expected = oracle.truth(
        oracle.dequantized_activations(x[:checked], recipe),
        oracle.dequantized_weight(weight, scale, recipe)[:columns],
    )
    arms: dict[str, Callable[[], torch.Tensor]] = {}
    for name in (*ARMS, "automatic"):
        chosen = None if name == "automatic" else name

        def run(chosen: str | None = chosen) -> torch.Tensor:
            return fp8dispatch.fp8_linear(x, weight, scale, backend=chosen)

        try:
            out = run()
        except BackendUnavailableError:
            continue
        oracle.assert_matches(out[:checked, :columns], expected, label=f"{name} {m}x{n}x{k}")
        arms[name] = run
    decision = fp8dispatch.explain(x, weight, scale)
    row: dict[str, Any] = {
        "recipe": str(recipe),
        "m": m,
        "n": n,
        "k": k,
        "chosen": decision.backend,
        "route": decision.route,
    }
    with torch.inference_mode():
        row["eager"] = _compare(arms)
        row["graph"] = _compare({name: capture(arm).replay for name, arm in arms.items()})
        row["bf16_us"] = round(
            do_bench(lambda: torch.nn.functional.linear(x, dense), rep=15, return_mode="median")
            * 1e3,
            1,
        )
    print(
        f"{recipe!s:14} {m:5}x{n:5}x{k:5} {decision.backend:9}"
        + "".join(
            f" {name} {us}/{row['eager']['us'][name]}" for name, us in row["graph"]["us"].items()
        )
        + f" bf16 {row['bf16_us']}",
        flush=True,
    )
    return row


def _compare(arms: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Median microseconds of each arm, and the automatic choice against the best of the others."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            times[name].append(do_bench(arm, warmup=2, rep=6, return_mode="median") * 1e3)
    us = {name: round(statistics.median(values), 1) for name, values in times.items()}
    best = min(value for name, value in us.items() if name != "automatic")
    mine = us["automatic"]
    return {
        "us": us,
        "loss": round(mine / best, 3),
        "late": mine > best * SLACK and mine > best + SLACK_US,
    }


def _compile(share: int, of: int) -> None:
    points = [(m, n, k) for n, k in WEIGHTS for m in ROWS]
    for m, n, k in points[share::of]:
        weight = torch.zeros(n, k, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        scale = torch.ones(-(-n // 128), -(-k // 128), device="cuda")
        x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
        try:
            fp8dispatch.fp8_linear(x, weight, scale, backend="deepgemm")
        except BackendUnavailableError as refusal:
            print(refusal)
            return


def compile_first(processes: int = 8) -> None:
    """Let DeepGEMM compile what the grid needs, several kernels at a time."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_compile, args=(share, processes)) for share in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.choice OUT.json | --compile")
    if sys.argv[1] == "--compile":
        compile_first()
    else:
        main(sys.argv[1])
