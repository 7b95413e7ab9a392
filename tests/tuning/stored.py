"""What tests of stored orders share: a machine, a point, and putting points on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128
from fp8dispatch.tuning import orders
from fp8dispatch.tuning.store import TunedPoint, TunedStore
from tests.tuning.conftest import start_anew

H200 = Machine(
    "cuda",
    "NVIDIA H200",
    (9, 0),
    {"torch": "2.11.0+cu130", "cuda": "13.0", "triton": "3.6.0", "torchao": "0.17.0", "numpy": "2"},
    driver="580.159.04",
    memory_bytes=150_111_977_472,
    uuid="GPU-1111",
)
PROBLEM = LinearProblem(16, 4096, 7168, BLOCK_128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16")
DAY = 1_790_000_000.0  # 2026-09-21


def point(**fields: Any) -> TunedPoint:
    values: dict[str, Any] = {
        "recipe": "block 128x128",
        "accuracy": "exact",
        "m": 16,
        "n": 4096,
        "k": 7168,
        "order": ("gluon", "cublaslt"),
        "us": {"gluon": 10.0, "cublaslt": 12.0},
        "tuned_at": DAY,
    }
    return TunedPoint(**{**values, **fields})


def put(store: TunedStore, *points: TunedPoint, machine: Machine = H200) -> Path:
    fingerprint = orders.fingerprint_of(machine)
    with store.turn(fingerprint) as refused:
        assert refused == ""
        path = store.add(fingerprint, points)
    start_anew()
    return path


def order(problem: LinearProblem = PROBLEM, machine: Machine = H200) -> tuple[str, ...] | None:
    found = orders.find(problem, machine)
    return None if found is None else found.order
