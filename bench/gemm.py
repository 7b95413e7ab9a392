"""Times the multiplication alone on quantised operands: ``python -m bench.gemm OUT.json``.

Each arm is captured in a CUDA graph, so that the time is the GPU's and not Python's. Arms alternate
within each round, every timing flushes L2 first (`triton.testing.do_bench`), data is normally
distributed, and a shape is timed only after every arm computed it right. Figures are medians over
rounds of the medians within a round. A second table gives the whole linear in eager, bf16 in and
out, with the time that one call keeps Python busy.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench

import fp8dispatch
from bench import environment
from fp8dispatch.recipe import BLOCK_128, ROW, Recipe
from tests import oracle

SHAPES = (
    (4096, 4096, 7168),
    (4096, 7168, 2048),
    (4096, 24576, 1536),
    (4096, 7168, 16384),
    (8192, 8192, 8192),
    (1024, 8192, 8192),
    (256, 7168, 16384),
    (64, 4096, 7168),
    (16, 4096, 7168),
    (1, 4096, 7168),
)
ROUNDS = 3


def main(path: str) -> None:
    """Time every shape and write the figures."""
    rows = []
    for recipe in (BLOCK_128, ROW):
        for m, n, k in SHAPES:
            rows.append(_time_shape(m, n, k, recipe))
    linear = [
        _time_linear(m, n, k, recipe)
        for recipe in (BLOCK_128, ROW)
        for m, n, k in ((16, 4096, 7168), (4096, 4096, 7168))
    ]
    environment.write(path, {"gemm": rows, "linear": linear})


def _time_shape(m: int, n: int, k: int, recipe: Recipe) -> dict[str, Any]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    weight, scale = fp8dispatch.quantize(dense, recipe)
    group = 128 if recipe.block_size is not None else None
    xq = fp8dispatch.QuantizedActivation.from_tensor(x, group_size=group)
    arms: dict[str, Callable[[], torch.Tensor]] = {"bf16": lambda: x @ dense.t()}
    rows = min(m, 256)
    expected = oracle.truth(
        oracle.dequantized_activations(x[:rows], recipe),
        oracle.dequantized_weight(weight, scale, recipe),
    )
    for backend in ("triton", "cublaslt"):

        def run(backend: str = backend) -> torch.Tensor:
            return fp8dispatch.fp8_linear_quantized(xq, weight, scale, backend=backend)

        oracle.assert_matches(run()[:rows], expected, label=f"{backend} {m}x{n}x{k}")
        arms[backend] = run
    times: dict[str, list[float]] = {name: [] for name in arms}
    graphs = {name: capture(arm) for name, arm in arms.items()}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(
                do_bench(graph.replay, warmup=10, rep=40, return_mode="median") * 1e3
            )
    row: dict[str, Any] = {"recipe": str(recipe), "m": m, "n": n, "k": k}
    for name, values in times.items():
        median = statistics.median(values)
        row[name] = {
            "us": round(median, 1),
            "spread_us": round(max(values) - min(values), 1),
            "tflops": round(2 * m * n * k / median / 1e6),
        }
    print(
        f"{recipe!s:14} {m:5}x{n:5}x{k:5}  "
        + "  ".join(f"{name} {row[name]['us']:8.1f} us {row[name]['tflops']:5}" for name in arms),
        flush=True,
    )
    return row


def capture(arm: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    """A graph of one call, warmed first."""
    arm()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arm()
    return graph


def _time_linear(m: int, n: int, k: int, recipe: Recipe) -> dict[str, Any]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    weight, scale = fp8dispatch.quantize(dense, recipe)
    arms: dict[str, Callable[[], torch.Tensor]] = {
        "bf16": lambda: torch.nn.functional.linear(x, dense)
    }
    for backend in ("triton", "cublaslt"):
        arms[backend] = lambda backend=backend: fp8dispatch.fp8_linear(
            x, weight, scale, backend=backend
        )
    row: dict[str, Any] = {"recipe": str(recipe), "m": m, "n": n, "k": k}
    with torch.inference_mode():
        for name, arm in arms.items():
            device_us = do_bench(arm, warmup=10, rep=40, return_mode="median") * 1e3
            row[name] = {"us": round(device_us, 1), "host_us": round(_host_us(arm), 1)}
    print(
        f"{recipe!s:14} {m:5}x{n:5}x{k:5}  "
        + "  ".join(
            f"{name} {row[name]['us']:8.1f} us (host {row[name]['host_us']})" for name in arms
        ),
        flush=True,
    )
    return row


def _host_us(arm: Callable[[], torch.Tensor]) -> float:
    """Median microseconds until a call returns, the GPU kept idle between calls."""
    times = []
    for _ in range(300):
        torch.cuda.synchronize()
        start = time.perf_counter()
        arm()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.gemm OUT.json")
    main(sys.argv[1])
