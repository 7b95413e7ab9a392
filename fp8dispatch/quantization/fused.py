"""RMSNorm and SiLU-gating that end in FP8: their arithmetic in plain torch, and who computes it.

Both are defined in fp32 from the inputs to the quantiser; what torch would round to 16 bits between
the two is not rounded. Unchecked [M, K] matrices in, FP8 data and scales out.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from fp8dispatch.probes.device import runs_kernels
from fp8dispatch.quantization import dynamic
from fp8dispatch.recipe import ceil_div


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm (arXiv:1910.07467) in fp32: ``x * weight / sqrt(mean(x^2) + eps)`` over columns.

    Differentiable as it stands.
    """
    wide = x.float()
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * weight.float() * factor


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's product (arXiv:2002.05202) in fp32: ``gate * sigmoid(gate) * up``.

    Differentiable as it stands.
    """
    return torch.nn.functional.silu(gate.float()) * up.float()


def rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
    *,
    use_kernels: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Add the residual, normalise, quantise.

    Args:
        x: [M, K] bf16, fp16 or fp32, any strides; `residual` alike, or None.
        weight: [K] of a float dtype.
        group_size: columns per scale; K or more gives one scale per token.
        use_kernels: run the Triton kernel or plain torch; None means the kernel on a GPU that it
            runs on.

    Returns:
        data [M, K]; scale [M, groups], M-major; the sum with the residual [M, K] in x's dtype.
    """
    if not _takes(x, group_size, use_kernels):
        total = None if residual is None else x + residual
        hidden = normalize(x if total is None else total, weight, eps)
        return *dynamic.quantize(hidden, group_size, dtype), total
    data, scale = _outputs(x, group_size, dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _kernels().rms_norm_quantize(x, weight, eps, data, scale, group_size, residual, total)
    return data, scale, total


def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
    *,
    use_kernels: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply ``silu(gate)`` [M, K] by `up` [M, K] and quantise; see `rms_norm_quantize`."""
    if not _takes(gate, group_size, use_kernels):
        return dynamic.quantize(silu_mul(gate, up), group_size, dtype)
    data, scale = _outputs(gate, group_size, dtype)
    _kernels().silu_mul_quantize(gate, up, data, scale, group_size)
    return data, scale


def _takes(x: torch.Tensor, group_size: int, use_kernels: bool | None) -> bool:
    if use_kernels is None:
        use_kernels = runs_kernels(x.device)
    return use_kernels and bool(_kernels().takes(x.shape[1], group_size))


def _outputs(
    x: torch.Tensor, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    data = torch.empty((m, k), dtype=dtype, device=x.device)
    groups = ceil_div(k, min(group_size, k))
    return data, torch.empty((groups, m), dtype=torch.float32, device=x.device).t()


@functools.cache
def _kernels() -> ModuleType:
    # Imported late because it imports Triton, which is not a requirement of the package.
    from fp8dispatch.kernels import fused_quantize

    return fused_quantize
