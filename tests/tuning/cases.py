"""What tests of tuning share: a weight, and calls that tune or explain over it."""

from __future__ import annotations

from typing import Any

import torch

import fp8dispatch
from fp8dispatch.tuning.measure import Point
from tests.tuning.conftest import Workbench

N, K = 24, 160
X = torch.randn(3, K, dtype=torch.bfloat16)
WEIGHT, SCALE = fp8dispatch.quantize(torch.randn(N, K))


def tune(bench: Workbench, *shapes: Any, **options: Any) -> fp8dispatch.TuningReport:
    options = {"device": "cpu", "timer": bench.timer, "progress": False, **options}
    return fp8dispatch.tune(shapes or [(3, N, K)], **options)


def explained(x: torch.Tensor = X, **options: Any) -> fp8dispatch.Decision:
    return fp8dispatch.explain(x, WEIGHT, SCALE, **options)


def states(point: Point) -> dict[str, str]:
    return {arm.backend: arm.state for arm in point.arms}
