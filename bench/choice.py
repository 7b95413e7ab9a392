"""Times every backend and the automatic choice on the whole linear: ``python -m bench.choice OUT``.

bf16 in, bf16 out, dynamic activations, through `fp8_linear`, in eager and as a CUDA graph. Arms
alternate, L2 is flushed before each timing, data is normally distributed, and a backend is timed on
a shape only after it computed it right. The table tells where the automatic choice is not the best
by more than 5 %: a route in `fp8dispatch/routes.json` with this result as its evidence mends that.
"""

from __future__ import annotations

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

WEIGHTS = ((4096, 7168), (24576, 1536), (8192, 8192))
ROWS = (1, 16, 64, 256, 4096)
ROUNDS = 3
# TorchAO times 48 configurations at the first call of each size: minutes over this grid.
LEFT_OUT = ("eager", "torchao")


def main(path: str) -> None:
    """Time the grid and write the figures."""
    rows = [
        _time_point(m, n, k, recipe)
        for recipe in (BLOCK_128, ROW)
        for n, k in WEIGHTS
        for m in ROWS
    ]
    late = [row for row in rows if row["graph"]["loss"] > 1.05 or row["eager"]["loss"] > 1.05]
    print(f"{len(late)} of {len(rows)} points where the choice costs more than 5 %")
    environment.write(path, {"choice": rows})


def _time_point(m: int, n: int, k: int, recipe: Recipe) -> dict[str, Any]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    weight, scale = fp8dispatch.quantize(dense, recipe)
    checked = min(m, 64)
    expected = oracle.truth(
        oracle.dequantized_activations(x[:checked], recipe),
        oracle.dequantized_weight(weight, scale, recipe),
    )
    arms: dict[str, Callable[[], torch.Tensor]] = {}
    for name in (*(name for name in registry.NAMES if name not in LEFT_OUT), "automatic"):
        chosen = None if name == "automatic" else name

        def run(chosen: str | None = chosen) -> torch.Tensor:
            return fp8dispatch.fp8_linear(x, weight, scale, backend=chosen)

        try:
            out = run()
        except BackendUnavailableError:
            continue
        oracle.assert_matches(out[:checked], expected, label=f"{name} {m}x{n}x{k}")
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
            do_bench(lambda: torch.nn.functional.linear(x, dense), rep=20, return_mode="median")
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
    """Median microseconds of each arm, and the automatic choice over the best of the others."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            times[name].append(do_bench(arm, warmup=3, rep=8, return_mode="median") * 1e3)
    us = {name: round(statistics.median(values), 1) for name, values in times.items()}
    best = min(value for name, value in us.items() if name != "automatic")
    return {"us": us, "loss": round(us["automatic"] / best, 3)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.choice OUT.json")
    main(sys.argv[1])
