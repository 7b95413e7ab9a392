"""The exceptions of fp8dispatch, and the refusal that explains why a backend was not used.

    FP8DispatchError
    |-- InvalidInputError (ValueError)        a call that no backend could serve as written
    |   |-- ShapeError                        shapes that do not fit together
    |   |   `-- AmbiguousRecipeError          shapes that can be read in two ways
    |   |-- DTypeError (TypeError)            a dtype or a kind of object that is not taken
    |   |-- DeviceError                       tensors on different devices
    |   |-- ScaleValueError                   a scale that is NaN, infinite or negative
    |   `-- CheckpointError                   files that are damaged, incomplete or refused
    |-- UnknownBackendError (ValueError)      a name that no backend has
    |-- ConfigurationError (ValueError)       an environment variable that cannot be read
    |-- CalibrationError (ValueError)         a model, a text or statistics that cannot be used
    |-- BackendUnavailableError (RuntimeError) no allowed backend runs this call here
    |-- FrozenWeightError (RuntimeError)      a gradient asked of an FP8 weight or its scale
    |-- UnsupportedTransformError (RuntimeError) a torch.func transform that is not supported
    `-- NumericalOverflowError (ArithmeticError) values that the FP8 format cannot hold

Every message is one sentence: what was needed, what was found, what to do.
"""

from __future__ import annotations

from dataclasses import dataclass


class FP8DispatchError(Exception):
    """Root of every error that fp8dispatch raises on purpose."""


class InvalidInputError(FP8DispatchError, ValueError):
    """The arguments of a call do not describe a linear layer over an FP8 weight."""


class ShapeError(InvalidInputError):
    """Shapes that do not fit together."""


class AmbiguousRecipeError(ShapeError):
    """A scale whose shape can be read in two ways that give different numbers."""


class DTypeError(InvalidInputError, TypeError):
    """A dtype, layout or kind of object that the argument does not take."""


class DeviceError(InvalidInputError):
    """Tensors of one call that lie on different devices."""


class ScaleValueError(InvalidInputError):
    """A scale that holds NaN, infinity or a negative value."""


class CheckpointError(InvalidInputError):
    """A checkpoint on disk that is damaged, incomplete, or in a form that is not taken."""


class UnknownBackendError(FP8DispatchError, ValueError):
    """A backend name that is not registered."""


class ConfigurationError(FP8DispatchError, ValueError):
    """An environment variable whose value cannot be read."""


class CalibrationError(FP8DispatchError, ValueError):
    """A model, a text or a file of statistics that calibration cannot use."""


class BackendUnavailableError(FP8DispatchError, RuntimeError):
    """Every backend that the policy allows refused the call."""


class FrozenWeightError(FP8DispatchError, RuntimeError):
    """A gradient was asked of an FP8 weight, its scale or the activation scale."""


class UnsupportedTransformError(FP8DispatchError, RuntimeError):
    """The call stands under a torch.func transform that it cannot follow."""


class NumericalOverflowError(FP8DispatchError, ArithmeticError):
    """Values that the FP8 format cannot hold, even after scaling.

    Attributes:
        max_value: the largest magnitude that was met; None where it was not computed.
        scale: the scale that was tried last, or None.
        attempts: how often the scale was reduced.
    """

    def __init__(
        self,
        message: str,
        *,
        max_value: float | None = None,
        scale: float | None = None,
        attempts: int = 0,
    ) -> None:
        super().__init__(message)
        self.max_value = max_value
        self.scale = scale
        self.attempts = attempts


@dataclass(frozen=True)
class Refusal:
    """Why one backend does not take one call, or does not run on this machine.

    Attributes:
        code: a stable, machine-readable name such as ``"capability"`` or ``"align-k"``.
        need: what the backend needs, worded to follow "needs".
        found: what was there instead, worded to follow "found".
    """

    code: str
    need: str
    found: str

    def __str__(self) -> str:
        return f"needs {self.need}, found {self.found}"
