"""Limits of E4M3, and the codec's scales, which multiply when quantising."""

from __future__ import annotations

import torch

from fp8dispatch.offset8.checks import check_finite, check_floats
from fp8dispatch.offset8.errors import ShapeMismatchError

FP8_MAX = 448.0


def divided(values: torch.Tensor, number: float) -> torch.Tensor:
    """The IEEE quotient on every device.

    On CUDA torch turns the division by a number into a product with its rounded reciprocal, and
    on every device that of a number by a tensor.
    """
    return values / torch.full((), number, device=values.device)


class FP8Format:
    """Limits of E4M3, and scales that map a tensor onto them: ``scale = 448 / amax``.

    The scale multiplies when quantising: the reciprocal of the multipliers that `fp8_linear` takes.

    Attributes:
        max_value: largest finite value.
        min_normal: smallest normal value.
        exponent_bits, mantissa_bits: widths of the fields.
    """

    max_value: float = FP8_MAX
    min_normal: float = 2.0**-6
    exponent_bits: int = 4
    mantissa_bits: int = 3

    @staticmethod
    def compute_scale(tensor: torch.Tensor) -> torch.Tensor:
        """``448 / amax`` of a whole tensor, and 1 where all of it is zero.

        Args:
            tensor: any shape, bfloat16, float16 or float32.

        Returns:
            One fp32 element without dimensions, on the tensor's device.

        Raises:
            DTypeError: another dtype.
            NumericalOverflowError: NaN or infinity in the tensor.
        """
        check_floats("tensor", tensor)
        if tensor.numel() == 0:
            return torch.ones((), device=tensor.device)
        amax = tensor.detach().abs().amax().float()
        check_finite(amax)
        scale = (torch.full_like(amax, FP8_MAX) / amax).clamp(max=torch.finfo(torch.float32).max)
        return torch.where(amax == 0, torch.ones_like(scale), scale)

    @staticmethod
    def compute_scale_per_channel(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """``448 / amax`` over one dimension, for codecs of one's own.

        Args:
            tensor: any shape, bfloat16, float16 or float32.
            dim: the dimension that is reduced: 1 gives a weight [out, in] one scale per output.

        Returns:
            fp32, with size 1 in place of `dim`. A channel of zeros gets 448, not 1.

        Raises:
            DTypeError, ShapeError: another dtype, or no such dimension.
            NumericalOverflowError: NaN or infinity in the tensor.
        """
        check_floats("tensor", tensor)
        if not -tensor.dim() <= dim < tensor.dim() or tensor.numel() == 0:
            raise ShapeMismatchError(
                f"tensor must have elements and a dimension {dim}, found {list(tensor.shape)}",
                expected=None,
                actual=tuple(tensor.shape),
                tensor_name="tensor",
            )
        amax = tensor.detach().abs().amax(dim, keepdim=True).float()
        check_finite(amax)
        amax = torch.where(amax == 0, torch.ones_like(amax), amax)
        return (torch.full_like(amax, FP8_MAX) / amax).clamp(max=torch.finfo(torch.float32).max)

    @staticmethod
    def is_in_range(tensor: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether ``tensor * scale``, computed in fp32, stays within 448.

        Args:
            tensor: any shape, bfloat16, float16 or float32.
            scale: broadcasts against the tensor.
        """
        check_floats("tensor", tensor)
        if tensor.numel() == 0:
            return True
        return bool((tensor.detach().float() * scale).abs().amax() <= FP8_MAX)
