"""Seconds from nothing to the first right result: ``python -m bench.coldstart OUT.json``.

Each figure is a fresh process with its own cache folders. "Nothing stored" compiles every Triton
kernel and runs every canary that the decision asks for; "verdicts stored" has only the verdicts of
an earlier process, "all stored" its compiled kernels too. Then the doctor, which probes or not.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import environment

RUNS = 3
CALL = """
import json, sys, time
start = time.perf_counter()
import torch
imported_torch = time.perf_counter()
import fp8dispatch
torch.manual_seed(0)
w = torch.randn(4096, 7168, device="cuda", dtype=torch.bfloat16)
x = torch.randn(16, 7168, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
cuda_ready = time.perf_counter()
recipe = sys.argv[1]
weight, scale = fp8dispatch.quantize(w, recipe)
torch.cuda.synchronize()
quantized = time.perf_counter()
out = fp8dispatch.fp8_linear(x, weight, scale)
torch.cuda.synchronize()
first = time.perf_counter()
wide = x.double() @ fp8dispatch.dequantize(weight, scale).double().t()
error = float((out.double() - wide).norm() / wide.norm())
assert error < 0.05, error
from fp8dispatch.prepare import prepared_bytes
print(json.dumps({
    "import torch": imported_torch - start,
    "CUDA context": cuda_ready - imported_torch,
    "quantize": quantized - cuda_ready,
    "first call": first - quantized,
    "backend": fp8dispatch.explain(x, weight, scale).backend,
    "prepared bytes": prepared_bytes(scale),
    "weight bytes": weight.nbytes,
}))
"""


def main(path: str) -> None:
    """Run every stage and write the figures."""
    rows = [_first_results(recipe) for recipe in ("block", "row")]
    environment.write(path, {"first result, seconds": rows, "doctor, seconds": _doctor()})


def _first_results(recipe: str) -> dict[str, Any]:
    stages: dict[str, list[dict[str, Any]]] = {
        "nothing stored": [],
        "verdicts stored": [],
        "all stored": [],
    }
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as verdicts, tempfile.TemporaryDirectory() as kernels:
            stages["nothing stored"].append(_process(recipe, verdicts, kernels))
            with tempfile.TemporaryDirectory() as other:
                stages["verdicts stored"].append(_process(recipe, verdicts, other))
            stages["all stored"].append(_process(recipe, verdicts, kernels))
    row: dict[str, Any] = {"recipe": recipe}
    for stage, runs in stages.items():
        row[stage] = {
            name: round(statistics.median(run[name] for run in runs), 2)
            for name in ("import torch", "CUDA context", "quantize", "first call")
        }
        row[stage]["backend"] = runs[-1]["backend"]
    for name in ("prepared bytes", "weight bytes"):
        row[name] = stages["all stored"][0][name]
    print(row, flush=True)
    return row


def _process(recipe: str, verdicts: str, kernels: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", CALL, recipe],
        env={**os.environ, "FP8DISPATCH_CACHE_DIR": verdicts, "TRITON_CACHE_DIR": kernels},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def _doctor() -> dict[str, float]:
    seconds: dict[str, float] = {}
    for name, options in (("doctor", []), ("doctor --probe", ["--probe"])):
        times = []
        for _ in range(RUNS):
            with tempfile.TemporaryDirectory() as cache:
                start = time.perf_counter()
                result = subprocess.run(
                    [sys.executable, "-m", "fp8dispatch.doctor", *options],
                    env={**os.environ, "FP8DISPATCH_CACHE_DIR": str(Path(cache))},
                    capture_output=True,
                    timeout=400,
                    check=False,
                )
                times.append(time.perf_counter() - start)
                if result.returncode not in (0, 1):
                    sys.exit(f"{name} exits with {result.returncode}: {result.stderr[-2000:]!r}")
            if name == "doctor --probe":
                break  # one run: it starts a child for every backend and recipe
        seconds[name] = round(statistics.median(times), 2)
    print(seconds, flush=True)
    return seconds


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.coldstart OUT.json")
    main(sys.argv[1])
