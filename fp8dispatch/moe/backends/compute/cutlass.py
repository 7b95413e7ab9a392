"""The computation of `fp8dispatch.moe.backends.cutlass`."""

from __future__ import annotations

import torch
from torch.nn.functional import (  # type: ignore[attr-defined]  # its stub lacks the second
    ScalingType,
    scaled_grouped_mm,
)

from fp8dispatch.backends.compute.operands import on_device
from fp8dispatch.moe.aligned import align_rows
from fp8dispatch.moe.backends.compute.places import brought_back, gathered, row_scales
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.cutlass import Cutlass
from fp8dispatch.moe.routing import Routing
from fp8dispatch.moe.scales import spread_rows
from fp8dispatch.problem import Accuracy, ExpertsProblem
from fp8dispatch.quantization import dynamic


def experts(
    self: Cutlass,
    x: torch.Tensor,
    weights: ExpertWeights,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    routing: Routing,
    problem: ExpertsProblem,
) -> torch.Tensor:
    if routing.inputs == 0:
        return torch.zeros((routing.rows, problem.n), dtype=torch.bfloat16, device=x.device)
    static = None if activation_scale is None else activation_scale[:1]
    data, scale = dynamic.quantize(x, problem.k, torch.float8_e4m3fn, static)
    places = align_rows(routing.sort(use_kernels=x.is_cuda), routing.inputs, 1)
    with on_device(x):  # it asks the current device what it can do
        computed: torch.Tensor = scaled_grouped_mm(
            gathered(data, places.source),
            weights.data.transpose(1, 2),
            row_scales(scale, places.source),
            ScalingType.RowWise,
            spread_rows(weights),
            ScalingType.RowWise,
            offs=places.sizes.cumsum(0).to(torch.int32),
            output_dtype=torch.bfloat16,
            use_fast_accum=problem.accuracy is Accuracy.FAST,
        )
    return brought_back(computed, places.target, routing.rows)
