"""The computation of `fp8dispatch.backends.fbgemm_family`."""

from __future__ import annotations

import torch

from fp8dispatch.backends.compute.operands import (
    aligned,
    group_scales,
    on_device,
    padded_rows,
    row_scales,
)
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.fbgemm_family import GROUPWISE, M_ALIGN, ROWWISE, FbgemmFamily
from fp8dispatch.backends.library import GROUP
from fp8dispatch.prepare import prepared
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import Granularity, ceil_div


def matmul(
    self: FbgemmFamily,
    x: QuantizedActivation,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    self.require(weight.recipe)
    with on_device(weight.data):
        if weight.recipe.granularity is Granularity.BLOCK:
            out: torch.Tensor = self._blocks(x, weight, problem)
            return out
        return _rowwise(self, x, weight, bias, problem)


def _rowwise(
    self: FbgemmFamily,
    x: QuantizedActivation,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    m, n = problem.m, problem.n
    spread = prepared(
        weight.scale_source,
        ("fbgemm", "row", n),
        lambda: weight.scale.reshape(-1).expand(n).clone(),
    )
    if bias is not None:
        bias = aligned(bias.to(torch.float32))
    data, x_scale = aligned(x.data[:m]), row_scales(x.scale, m)
    check_operand("activations", data, (m, problem.k), torch.float8_e4m3fn)
    check_operand("activation scales", x_scale, (m,), torch.float32)
    check_operand("weight scales", spread, (n,), torch.float32)
    fast = problem.accuracy is Accuracy.FAST
    return self._ops[ROWWISE](data, weight.data, x_scale, spread, bias, fast)


def _blocks(
    self: FbgemmFamily, x: QuantizedActivation, weight: Weight, problem: LinearProblem
) -> torch.Tensor:
    rows = ceil_div(problem.m, M_ALIGN) * M_ALIGN
    groups, blocks = problem.k // GROUP, ceil_div(problem.n, GROUP)
    weight_scale = prepared(
        weight.scale_source,
        ("fbgemm", "block"),
        lambda: weight.scale.t().clone(memory_format=torch.contiguous_format),
    )
    data, x_scale = padded_rows(x.data, rows), group_scales(x.scale, rows, groups)
    # Whatever is wrong here would be computed all the same, or end the CUDA context.
    check_operand("activations", data, (rows, groups * GROUP), torch.float8_e4m3fn)
    check_operand("weight", weight.data, (problem.n, groups * GROUP), torch.float8_e4m3fn)
    check_operand("activation scales", x_scale, (groups, rows), torch.float32)
    check_operand("weight scales", weight_scale, (groups, blocks), torch.float32)
    out = self._ops[GROUPWISE](data, weight.data, x_scale, weight_scale)
    return out[: problem.m]


def check_operand(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Hold an operand to the layout that a kernel reads without looking.

    Raises:
        RuntimeError: another shape, dtype or layout.
    """
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise RuntimeError(
            f"the {name} must be contiguous {list(shape)} {dtype}, found {list(tensor.shape)} "
            f"{tensor.dtype} with strides {list(tensor.stride())}; this is a bug of fp8dispatch"
        )
