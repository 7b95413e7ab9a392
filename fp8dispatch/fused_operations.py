"""The operations that a fused linear begins with, in FP8 forward and in fp32 backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.quantization.fused_activation import rms_norm_quantize, silu_mul_quantize


class Operation(Protocol):
    """What comes before the quantiser: a function of two tensors and perhaps a residual."""

    def quantize(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        residual: torch.Tensor | None,
        group_size: int | None,
        dtype: torch.dtype,
    ) -> tuple[QuantizedActivation, torch.Tensor | None]:
        """The quantised result, and the sum with the residual where there is one."""

    def gradients(
        self, grad: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of both tensors in fp32, of `grad` [..., K] in fp32."""


@dataclass(frozen=True)
class RMSNorm:
    """RMSNorm of x, or of its sum with a residual, times the norm's weight."""

    eps: float

    def quantize(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        residual: torch.Tensor | None,
        group_size: int | None,
        dtype: torch.dtype,
    ) -> tuple[QuantizedActivation, torch.Tensor | None]:
        if residual is None:
            alone = rms_norm_quantize(first, second, self.eps, group_size=group_size, dtype=dtype)
            return alone, None
        return rms_norm_quantize(
            first, second, self.eps, residual=residual, group_size=group_size, dtype=dtype
        )

    def gradients(
        self, grad: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``y = h * w * r`` with ``r = (mean(h^2) + eps)^(-1/2)``, so ``dr/dh = -r^3 h / K``."""
        hidden = first.float()
        factor = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)
        normal = hidden * factor
        scaled = grad * second.float()
        of_hidden = factor * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
        of_weight = (grad * normal).reshape(-1, grad.shape[-1]).sum(0)
        return of_hidden, of_weight


@dataclass(frozen=True)
class SiluMul:
    """``silu(gate) * up``."""

    def quantize(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        residual: torch.Tensor | None,
        group_size: int | None,
        dtype: torch.dtype,
    ) -> tuple[QuantizedActivation, torch.Tensor | None]:
        return silu_mul_quantize(first, second, group_size=group_size, dtype=dtype), None

    def gradients(
        self, grad: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``y = g * s(g) * u`` with the logistic s, so ``d(g s)/dg = s (1 + g (1 - s))``."""
        gate = first.float()
        logistic = torch.sigmoid(gate)
        slope = logistic * (1 + gate * (1 - logistic))
        return grad * second.float() * slope, grad * gate * logistic
