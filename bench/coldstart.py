"""Seconds from nothing to the first right result: ``python -m bench coldstart``.

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
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.session import Point, Row, Session

HANG_SECONDS = 590.0  # `doctor --probe` starts a child for every backend and recipe
CALL = """
import json, sys, time
start = time.perf_counter()
import torch
imported_torch = time.perf_counter()
import fp8dispatch
torch.manual_seed(0)
recipe, device = sys.argv[1:]
synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
n, k = (4096, 7168) if device == "cuda" else (256, 256)
w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
x = torch.randn(16, k, device=device, dtype=torch.bfloat16)
synchronize()
cuda_ready = time.perf_counter()
weight, scale = fp8dispatch.quantize(w, recipe)
synchronize()
quantized = time.perf_counter()
out = fp8dispatch.fp8_linear(x, weight, scale)
synchronize()
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


def points(session: Session) -> Iterator[Point]:
    """Two recipes, and the doctor."""
    for recipe in ("block", "row"):
        yield f"first result, {recipe}", partial(first_results, session, recipe)
    yield "doctor", partial(doctor, session.rounds)


def summary(rows: list[Row]) -> dict[str, Any]:
    """The rows by what they are about."""
    return {
        "first result, seconds": [row for row in rows if "recipe" in row],
        "doctor, seconds": next((row["seconds"] for row in rows if "doctor" in row), {}),
    }


def first_results(session: Session, recipe: str) -> Row:
    """A fresh process with nothing stored, with verdicts, with verdicts and kernels."""
    stages: dict[str, list[dict[str, Any]]] = {
        "nothing stored": [],
        "verdicts stored": [],
        "all stored": [],
    }
    device = session.device
    for _ in range(session.rounds):
        with tempfile.TemporaryDirectory() as verdicts, tempfile.TemporaryDirectory() as kernels:
            stages["nothing stored"].append(_process(recipe, device, verdicts, kernels))
            with tempfile.TemporaryDirectory() as other:
                stages["verdicts stored"].append(_process(recipe, device, verdicts, other))
            stages["all stored"].append(_process(recipe, device, verdicts, kernels))
    row: Row = {"recipe": recipe}
    for stage, runs in stages.items():
        row[stage] = {
            name: round(statistics.median(run[name] for run in runs), 2)
            for name in ("import torch", "CUDA context", "quantize", "first call")
        }
        row[stage]["backend"] = runs[-1]["backend"]
    for name in ("prepared bytes", "weight bytes"):
        row[name] = stages["all stored"][0][name]
    return row


def _process(recipe: str, device: str, verdicts: str, kernels: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", CALL, recipe, device],
        env={**os.environ, "FP8DISPATCH_CACHE_DIR": verdicts, "TRITON_CACHE_DIR": kernels},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def doctor(runs: int) -> Row:
    """Seconds of the doctor as a command, which probes or not; each with an empty cache."""
    seconds: dict[str, float] = {}
    for name, options in (("doctor", []), ("doctor --probe", ["--probe"])):
        times = []
        for _ in range(runs if not options else 1):  # the probe starts many children
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
                # 3 is "no GPU", which a rehearsal finds.
                if result.returncode not in (0, 1, *(() if torch.cuda.is_available() else (3,))):
                    told = result.stderr[-2000:]
                    raise RuntimeError(f"{name} exits with {result.returncode}: {told!r}")
        seconds[name] = round(statistics.median(times), 2)
    return {"doctor": True, "seconds": seconds}
