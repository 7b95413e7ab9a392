"""What a call keeps the host busy for: ``python -m bench.host OUT.json [BACKEND,BACKEND...]``.

Warm, eager, no gradient, on a problem so small that the GPU waits. Each backend's own entry point
is called directly with everything prepared (``backend.linear`` on a described problem), then
through `fp8_linear`; the difference is what `fp8_linear` costs over it. Arms alternate, 20 calls at
a time, and figures are medians over the rounds. "Front alone" has the computation replaced by a
function that returns at once: what is left is `fp8_linear`, in a loop that stays in the caches.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import fp8dispatch
from bench import environment
from fp8dispatch import registry
from fp8dispatch.backends.contract import Backend, Weight
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.recipe import BLOCK_128, ROW, Recipe

M, N, K = 16, 256, 256
CALLS, ROUNDS = 20, 300


def main(path: str, names: tuple[str, ...]) -> None:
    """Time every backend on both recipes and write the figures."""
    rows = [_time(name, recipe) for recipe in (BLOCK_128, ROW) for name in names]
    environment.write(path, {"host": [row for row in rows if row is not None]})


def _time(name: str, recipe: Recipe) -> dict[str, Any] | None:
    dense = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    x3 = x.view(2, M // 2, K)
    data, scale = fp8dispatch.quantize(dense, recipe)
    with torch.no_grad():
        try:
            decision = fp8dispatch.explain(x, data, scale, backend=name)
        except BackendUnavailableError:
            return None
        backend, problem = registry.load(name), decision.problem
        operand = Weight(data, weight_scale_fp32(scale, recipe, N, K), recipe, scale)
        arms: dict[str, Callable[[], torch.Tensor]] = {
            "entry": lambda: backend.linear(x, operand, None, None, problem),
            "fp8_linear": lambda: fp8dispatch.fp8_linear(x, data, scale, backend=name),
            "fp8_linear, 3 dimensions": lambda: fp8dispatch.fp8_linear(
                x3, data, scale, backend=name
            ),
            "bf16": lambda: torch.nn.functional.linear(x, dense),
        }
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(ROUNDS):
            for arm, call in arms.items():
                times[arm].append(_us(call))
        front = _front(backend, x, data, scale)
    us = {arm: round(statistics.median(values), 2) for arm, values in times.items()}
    over = [
        through - direct
        for through, direct in zip(times["fp8_linear"], times["entry"], strict=True)
    ]
    row = {
        "backend": name,
        "recipe": str(recipe),
        "us": us,
        "over_entry_us": round(statistics.median(over), 2),
        "over_entry_quartiles_us": [round(q, 2) for q in statistics.quantiles(over)],
        "front_alone_us": front,
    }
    print(row, flush=True)
    return row


def _front(backend: Backend, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> float:
    """Microseconds of `fp8_linear` around a computation that takes none."""
    out = fp8dispatch.fp8_linear(x, data, scale, backend=backend.name)
    weight = data.clone()  # another weight, so that its plan is made anew

    def stub(*_: Any) -> torch.Tensor:
        return out

    with mock.patch.object(backend, "linear", stub):
        over = [
            _us(lambda: fp8dispatch.fp8_linear(x, weight, scale, backend=backend.name)) - _us(stub)
            for _ in range(ROUNDS)
        ]
    return round(statistics.median(over), 2)


def _us(call: Callable[[], torch.Tensor]) -> float:
    """Microseconds a call, over calls made back to back."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / CALLS * 1e6


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m bench.host OUT.json [BACKEND,BACKEND...]")
    chosen = registry.NAMES if len(sys.argv) == 2 else tuple(sys.argv[2].split(","))
    main(sys.argv[1], tuple(name for name in chosen if name != "eager"))
