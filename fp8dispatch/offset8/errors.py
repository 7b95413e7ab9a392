"""The errors of the offset codec, with the names and attributes that the codec's origin gives them.

    TritonKernelError (FP8DispatchError)       its name for the root of all errors
    |-- ShapeMismatchError (ShapeError)         expected, actual, tensor_name
    |-- UnsupportedDtypeError (DTypeError)      dtype, supported_dtypes, tensor_name
    |-- DeviceError (fp8dispatch.DeviceError)   expected_device, actual_device, tensor_name
    `-- NumericalOverflowError                  max_value, scale, attempts

A scale that is not positive is a ``ScaleValueError``, which is a ``ValueError`` as in the origin.
The origin's ``TuningFailedError`` is missing: nothing here is tuned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8dispatch import errors
from fp8dispatch.errors import FP8DispatchError as TritonKernelError

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceError", "ShapeMismatchError", "TritonKernelError", "UnsupportedDtypeError"]


class ShapeMismatchError(errors.ShapeError):
    """A tensor of another shape than its argument takes.

    Attributes:
        expected: the shape that fits, ``()`` for one element; None where many do.
        actual: the shape that was found.
        tensor_name: of the argument.
    """

    def __init__(
        self,
        message: str,
        *,
        expected: tuple[int, ...] | None,
        actual: tuple[int, ...],
        tensor_name: str,
    ) -> None:
        super().__init__(message)
        self.expected, self.actual, self.tensor_name = expected, actual, tensor_name


class UnsupportedDtypeError(errors.DTypeError):
    """A tensor of a dtype that its argument does not take.

    Attributes:
        dtype: what was found.
        supported_dtypes: what the argument takes.
        tensor_name: of the argument.
    """

    def __init__(
        self,
        message: str,
        *,
        dtype: object,
        supported_dtypes: tuple[torch.dtype, ...],
        tensor_name: str,
    ) -> None:
        super().__init__(message)
        self.dtype, self.supported_dtypes = dtype, supported_dtypes
        self.tensor_name = tensor_name


class DeviceError(errors.DeviceError):
    """A tensor on another device than the one beside it.

    Attributes:
        expected_device: where the other tensor lies, such as ``"cuda:0"``. The origin has
            ``"cuda"`` there at all times; here any device will do that all tensors share.
        actual_device: where it was found.
        tensor_name: of the argument.
    """

    def __init__(
        self, message: str, *, expected_device: str, actual_device: str, tensor_name: str
    ) -> None:
        super().__init__(message)
        self.expected_device, self.actual_device = expected_device, actual_device
        self.tensor_name = tensor_name
