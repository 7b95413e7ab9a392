"""The computation of `fp8dispatch.backends.fbgemm_tile`."""

from __future__ import annotations

import torch

from fp8dispatch.backends.compute.fbgemm_family import check_operand
from fp8dispatch.backends.compute.operands import aligned
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.fbgemm_tile import BLOCKWISE, TileScales
from fp8dispatch.backends.library import GROUP
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import ceil_div


def _blocks(
    self: TileScales, x: QuantizedActivation, weight: Weight, problem: LinearProblem
) -> torch.Tensor:
    m, n, k = problem.m, problem.n, problem.k
    grid = ceil_div(m, GROUP), ceil_div(k, GROUP)
    if x.scale.shape != grid:
        raise BackendUnavailableError(
            f"{self.name} needs activations that it quantises itself, with one scale per "
            f"128x128 tile {list(grid)}, found scales {list(x.scale.shape)}; pass the "
            f"unquantised X to fp8_linear, or take another backend"
        )
    data, x_scale, weight_scale = aligned(x.data), aligned(x.scale), aligned(weight.scale)
    check_operand("activations", data, (m, k), torch.float8_e4m3fn)
    check_operand("weight", weight.data, (n, k), torch.float8_e4m3fn)
    check_operand("activation scales", x_scale, grid, torch.float32)
    check_operand("weight scales", weight_scale, (ceil_div(n, GROUP), grid[1]), torch.float32)
    blocks = (GROUP, GROUP, GROUP)
    return self._ops[BLOCKWISE](data, weight.data, x_scale, weight_scale, *blocks)
