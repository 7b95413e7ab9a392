"""The function names of Unsloth's FP8 module, with their signatures.

What differs, because theirs is wrong there: the bias is added in every recipe and has a
gradient, backward uses the block size of the weight, a block of zeros gives zeros and not NaN,
and K and N may be ragged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8dispatch.autograd import FP8LinearFunction
from fp8dispatch.linear import fp8_linear, fp8_linear_quantized
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.quantization.weight import dequantize


def act_quant(x: torch.Tensor, block_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations to e4m3fn with one scale per `block_size` columns.

    Args:
        x: [..., K] bfloat16, float16 or float32; K may be ragged.
        block_size: columns per scale.

    Returns:
        data [..., K], and scales [..., ceil(K / block_size)] in fp32, ``value = data * scale``.
    """
    quantized = QuantizedActivation.from_tensor(x, group_size=block_size)
    return quantized.data, quantized.scale.reshape(*x.shape[:-1], quantized.scale.shape[-1])


def weight_dequant(
    x: torch.Tensor,
    s: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Dequantise an FP8 weight: `fp8dispatch.dequantize` under another name.

    Args:
        x: [N, K] FP8.
        s: multipliers in any shape that `fp8_linear` takes as a weight scale.
        dtype: bfloat16, float16 or float32.
        block_size: (block_n, block_k); else the tensors' ``block_size`` holds, else 128x128
            where the scale has that shape. It is never guessed by dividing shapes.

    Returns:
        [N, K] in `dtype`.
    """
    return dequantize(x, s, block_size=block_size, dtype=dtype)


def w8a8_block_fp8_matmul_triton(
    A: torch.Tensor,
    B: torch.Tensor,
    As: torch.Tensor,
    Bs: torch.Tensor,
    block_size: Sequence[int],
    output_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``A @ B.T`` of quantised operands on our Triton kernels, and on nothing else.

    Args:
        A: [..., K] FP8 activations, `As` their scales [..., ceil(K / block_k)] in fp32.
        B: [N, K] FP8 weight, `Bs` its scales [ceil(N / block_n), ceil(K / block_k)].
        block_size: [block_n, block_k].
        output_dtype: bfloat16, float16 or float32.

    Raises:
        InvalidInputError: operands that do not fit together.
        BackendUnavailableError: the kernels do not run here; the message says why.
    """
    return fp8_linear_quantized(
        QuantizedActivation(A, As),
        B,
        Bs,
        block_size=block_size,
        out_dtype=output_dtype,
        backend="triton",
    )


def fp8_block_quant_linear(
    X: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`fp8_linear` under its block-wise name."""
    return fp8_linear(X, weight, weight_scale)


def fbgemm_fp8_linear(
    X: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fp8_linear` under its row-wise name; it does not need FBGEMM."""
    return fp8_linear(X, weight, weight_scale, bias)


class FP8BlockQuantLinear(FP8LinearFunction):
    """``FP8BlockQuantLinear.apply(X, weight, weight_scale)``: `fp8_linear` with its gradients."""

    @classmethod
    def apply(
        cls, X: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
    ) -> torch.Tensor:
        """`fp8_linear` of the same arguments."""
        return fp8_linear(X, weight, weight_scale)


class FbgemmFp8Linear_matmul(FP8LinearFunction):
    """``FbgemmFp8Linear_matmul.apply(x, weight, weight_scale, bias)``: `fp8_linear` likewise."""

    @classmethod
    def apply(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`fp8_linear` of the same arguments."""
        return fp8_linear(x, weight, weight_scale, bias)
