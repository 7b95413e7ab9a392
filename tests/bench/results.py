"""Planted results, in the form that the suites write them."""

from __future__ import annotations

from typing import Any

MACHINE = {
    "gpu": "NVIDIA H200",
    "date": "2026-01-01",
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
}
CEILINGS = {"part": "ceilings", "copy_tb_s": 4.0, "bf16_tflops": 700.0, "read_tb_s": 4.5}
WEIGHTS = ((4096, 7168), (7168, 2048))


def figures(us: dict[str, float], spread: float = 0.0) -> dict[str, dict[str, float]]:
    """Microseconds as a row keeps them, with one spread for all."""
    return {"us": dict(us), "spread_us": dict.fromkeys(us, spread)}


def result(suite: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A result file's content."""
    return {"machine": MACHINE, "suite": suite, "rehearsal": False, suite: rows, **more}


def linear_row(
    m: int, n: int, k: int, us: dict[str, float], recipe: str = "block 128x128", **more: Any
) -> dict[str, Any]:
    """A row of `linear`; the automatic choice may take what is not a reference."""
    others = ("automatic", "bf16", "fbgemm_tile", "weight_only")
    choices = [name for name in us if name not in others]
    best = min(us[name] for name in choices)
    late = us["automatic"] > best * 1.05 and us["automatic"] > best + 2
    compared = {**figures(us), "loss": us["automatic"] / best, "late": late}
    return {
        "recipe": recipe,
        "accuracy": "exact",
        "m": m,
        "n": n,
        "k": k,
        "chosen": min(choices, key=lambda name: us[name]),
        "chosen without libraries": "gluon",
        "selectable": choices,
        "eager": compared,
        "graph": compared,
        "wall": figures(us),
        **more,
    }
