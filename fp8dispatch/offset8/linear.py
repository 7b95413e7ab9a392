"""A trainable linear layer that multiplies offset codes. Its weight stays a float parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fp8dispatch.checks import check_activations, check_choice, check_size
from fp8dispatch.errors import ShapeError
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.offset8.codec import dequantize_fp8, quantize_fp8
from fp8dispatch.offset8.gemm import fp8_gemm
from fp8dispatch.prepare import invalidate, prepared


class FP8Linear(nn.Module):
    """``y = x @ weight.T + bias`` on the offset codes of `x` and of `weight`. Not real FP8.

    The weight is a float parameter that an optimizer may change. Its codes are made at the first
    call and again whenever torch counts a change of it; after a write that torch does not count
    (``.data``, another library) call `refresh`. Gradients pass the rounding straight through: dX
    uses the restored weight, dW the restored activations.

    For a layer over real E4M3 bytes see ``fp8dispatch.FP8Linear``.

    Args:
        in_features: K.
        out_features: N.
        bias: whether a bias [N] is added.
        dtype: bfloat16, float16 or float32 of weight and bias, default torch's default dtype.
        device: where to put them.

    Raises:
        DTypeError, ShapeError: arguments that do not fit.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_choice("dtype", dtype, ACTIVATION_DTYPES)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(
            torch.empty((out_features, in_features), dtype=dtype, device=device)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from ±1 / sqrt(K), as ``nn.Linear`` does."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight_fp8(self) -> torch.Tensor:
        """[N, K] uint8 codes of the weight as it is now."""
        return self._codes()[0]

    @property
    def weight_scale(self) -> torch.Tensor:
        """The fp32 element that the codes were made with: ``448 / amax``."""
        return self._codes()[1]

    def refresh(self) -> None:
        """Forget the codes of the weight, so that the next use makes them anew."""
        invalidate(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N] in the dtype of `x`.

        Raises:
            DTypeError, ShapeError, DeviceError: an `x` that does not fit.
            NumericalOverflowError: NaN or infinity in `x` or in the weight.
        """
        check_activations("x", x)
        if x.shape[-1] != self.in_features:
            raise ShapeError(
                f"x must be [..., {self.in_features}], one value per column of the weight, found "
                f"{list(x.shape)}"
            )
        codes, scale = self._codes()
        flat = x.reshape(-1, self.in_features)
        y: torch.Tensor = _Product.apply(flat, self.weight, codes, scale)  # type: ignore[no-untyped-call]
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else (y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes, as ``print(model)`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        return prepared(self.weight, "offset8", lambda: quantize_fp8(self.weight))


class _Product(torch.autograd.Function):
    """[M, K] by codes [N, K], with gradients for x and for the weight behind the codes."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x_codes, x_scale = quantize_fp8(x)
            ctx.save_for_backward(x_codes, x_scale, codes, scale)
            ctx.dtypes = x.dtype, weight.dtype
            return fp8_gemm(x_codes, codes.t(), x_scale, scale, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x_codes, x_scale, codes, scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        wide, dx, dw = grad.float(), None, None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (wide @ dequantize_fp8(codes, scale, torch.float32)).to(x_dtype)
            if ctx.needs_input_grad[1]:
                dw = (wide.t() @ dequantize_fp8(x_codes, x_scale, torch.float32)).to(weight_dtype)
        return dx, dw, None, None
