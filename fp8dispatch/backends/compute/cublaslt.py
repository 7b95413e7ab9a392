"""The computation of `fp8dispatch.backends.cublaslt`."""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType, pad, scaled_mm

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.cublaslt import CuBlasLt
from fp8dispatch.prepare import prepared
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import Granularity, ceil_div


def matmul(
    self: CuBlasLt,
    x: QuantizedActivation,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    extra = -x.data.shape[0] % self.row_multiple(problem)
    data, x_scale = x.data.contiguous(), x.scale
    if extra:
        data = pad(data.view(torch.uint8), (0, 0, 0, extra)).view(data.dtype)
        if x_scale.shape[0] > 1:
            x_scale = pad(x_scale, (0, 0, 0, extra), value=1.0)
    out_dtype: torch.dtype = getattr(torch, problem.out_dtype)
    fused = bias is not None and bias.dtype == out_dtype and out_dtype != torch.float32
    # A bias of another dtype is added to an fp32 product: the sum is rounded only once.
    product_dtype = out_dtype if bias is None or fused else torch.float32
    scales = _block_scales if weight.recipe.block_size is not None else _row_scales
    out: torch.Tensor = scaled_mm(
        data,
        weight.data.t(),
        *scales(x_scale, data.shape[0], weight, problem),
        bias=bias if fused else None,
        output_dtype=product_dtype,
        use_fast_accum=scales is _row_scales and problem.accuracy is Accuracy.FAST,
    )
    out = out[: problem.m]
    return out if bias is None or fused else out.add_(bias).to(out_dtype)


# What scaled_mm takes: the activations' scale and how to read it, the weight's and how to read it.
_Scales = tuple[torch.Tensor, ScalingType, torch.Tensor, ScalingType]


def _block_scales(
    x_scale: torch.Tensor, rows: int, weight: Weight, problem: LinearProblem
) -> _Scales:
    """M-major activation scales, and the weight's in the layout prepared once."""
    block = weight.recipe.block_size
    prepared_scale = prepared(
        weight.scale_source, ("cublaslt", block), lambda: _block_layout(weight)
    )
    return (
        _m_major(x_scale.expand(rows, weight.scale.shape[1])),
        ScalingType.BlockWise1x128,
        prepared_scale,
        ScalingType.BlockWise128x128 if block == (128, 128) else ScalingType.BlockWise1x128,
    )


def _row_scales(
    x_scale: torch.Tensor, rows: int, weight: Weight, problem: LinearProblem
) -> _Scales:
    """One scale for each operand where both are single numbers, else one for each row."""
    if problem.static_activation and weight.recipe.granularity is Granularity.TENSOR:
        tensorwise = ScalingType.TensorWise
        return x_scale.reshape(1), tensorwise, weight.scale, tensorwise
    n = weight.data.shape[0]
    spread = prepared(
        weight.scale_source,
        ("cublaslt", "row", n),
        lambda: weight.scale.reshape(1, -1).expand(1, n).clone(),
    )
    rowwise = ScalingType.RowWise
    return x_scale.expand(rows, 1).contiguous(), rowwise, spread, rowwise


def _m_major(scale: torch.Tensor) -> torch.Tensor:
    """[M, groups] with strides (1, M); copied only when it lies otherwise."""
    rows, groups = scale.shape
    if scale.stride() == (1, rows):
        return scale
    laid_out = torch.empty_strided(
        (rows, groups), (1, rows), dtype=torch.float32, device=scale.device
    )
    return laid_out.copy_(scale)


def _block_layout(weight: Weight) -> torch.Tensor:
    """Weight scales as cuBLASLt reads them.

    128x128: [round_up(groups, 4), ceil(N / 128)] with the groups of one row of blocks side by
    side; 1x128: [N, groups] with N side by side.
    """
    blocks, groups = weight.scale.shape
    if weight.recipe.block_size == (1, 128):
        return _m_major(weight.scale)
    padded = ceil_div(groups, 4) * 4
    laid_out = torch.zeros((blocks, padded), dtype=torch.float32, device=weight.scale.device)
    laid_out[:, :groups] = weight.scale
    return laid_out.t()
