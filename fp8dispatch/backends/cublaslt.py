"""cuBLASLt through ``torch.nn.functional.scaled_mm``: per tensor, per row, and blocks on Hopper.

What it needs, and what was measured on an H200 (torch 2.11, cuBLAS 13.1):

* N and K multiples of 16, a row-major weight, 16-byte aligned memory.
* Blocks only as 128x128 weights or 1x128 groups, only on capability 9.0, with CUDA 12.9 or later.
  Activation scales are M-major with M a multiple of 4 (otherwise CUBLAS_STATUS_NOT_SUPPORTED), so
  M is padded. Scales of 128x128 weights are K-major with K padded to 4 blocks, once per weight.
  The older ``torch._scaled_mm`` takes them unpadded and then computes garbage; it is not used.
* A bias is fused in the output's own dtype, bf16 or fp16; any other bias is added to an fp32
  product, which costs a pass over it.
* ``use_fast_accum`` trades accuracy for 10 to 20 % of time in the per-row and per-tensor
  recipes; it is on only where the policy allows `Accuracy.FAST`. Blocks are always exact.
"""

from __future__ import annotations

import torch
from packaging.version import Version
from torch.nn.functional import ScalingType, pad, scaled_mm

from fp8dispatch.backends.contract import Backend, Weight
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.prepare import prepared
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import Granularity, ceil_div

_BLOCKS = ((128, 128), (1, 128))
_BLOCK_CAPABILITY = (9, 0)
_BLOCK_CUDA = "12.9"
_M_ALIGN = 4  # activation scales are fp32 and M-major: 16 bytes per group


class CuBlasLt(Backend):
    """FP8 GEMMs of the cuBLASLt that torch was built with."""

    name = "cublaslt"
    distribution = "torch"
    distributions = ("nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cublas-cu13")
    minimum_version = "2.10"
    capabilities = ((8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
    verified_capabilities = ((9, 0),)
    weight_dtypes = frozenset({"float8_e4m3fn", "float8_e5m2"})
    align_n = 16
    align_k = 16
    accuracies = frozenset({Accuracy.EXACT, Accuracy.FAST})

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals: list[Refusal] = []
        if not problem.weight_row_major:
            refusals.append(Refusal("layout", "a row-major weight [N, K]", "other strides"))
        if not problem.aligned:
            refusals.append(
                Refusal("alignment", "weight memory aligned to 16 bytes", "an odd address")
            )
        if problem.activation_dtype == problem.weight_dtype == "float8_e5m2":
            refusals.append(Refusal("dtype-pair", "at most one e5m2 operand", "two"))
        if problem.recipe.granularity is Granularity.BLOCK:
            refusals += _refuse_block(problem, machine)
        return refusals

    def row_multiple(self, problem: LinearProblem) -> int:
        return _M_ALIGN if problem.recipe.granularity is Granularity.BLOCK else 1

    def matmul(
        self,
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


def _refuse_block(problem: LinearProblem, machine: Machine) -> list[Refusal]:
    refusals: list[Refusal] = []
    if machine.capability != _BLOCK_CAPABILITY:
        refusals.append(Refusal("capability", "capability 9.0 for block scales", str(machine)))
    cuda = machine.version("cuda")
    if cuda is None or cuda < Version(_BLOCK_CUDA):
        refusals.append(
            Refusal(
                "cuda",
                f"torch built with CUDA >= {_BLOCK_CUDA} for block scales",
                machine.versions.get("cuda", "none"),
            )
        )
    if problem.weight_dtype != "float8_e4m3fn":
        refusals.append(
            Refusal("weight-dtype", "float8_e4m3fn weights with blocks", problem.weight_dtype)
        )
    if problem.recipe.block_size not in _BLOCKS:
        refusals.append(Refusal("block-size", "blocks 128x128 or 1x128", str(problem.recipe)))
    return refusals


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


BACKEND = CuBlasLt()
