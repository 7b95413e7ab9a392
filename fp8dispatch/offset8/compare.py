"""How far a quantised computation lies from its baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8dispatch.checks import check_dense
from fp8dispatch.offset8.errors import ShapeMismatchError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BaselineComparison:
    """How far a result lies from a baseline.

    Attributes:
        max_error: largest absolute difference.
        mean_error: mean absolute difference.
        relative_error: mean of ``|difference| / |baseline|`` where the baseline exceeds 1e-6.
    """

    max_error: float
    mean_error: float
    relative_error: float


def compare_to_baseline(result: torch.Tensor, baseline: torch.Tensor) -> BaselineComparison:
    """Errors of a quantised computation against the same in fp16 or better.

    Args:
        result, baseline: floating tensors of one shape.

    Raises:
        ShapeError: two shapes, or nothing to compare.
    """
    check_dense("result", result)
    check_dense("baseline", baseline)
    if result.shape != baseline.shape or result.numel() == 0:
        raise ShapeMismatchError(
            f"result and baseline must have one shape with elements, found {list(result.shape)} "
            f"and {list(baseline.shape)}",
            expected=tuple(baseline.shape),
            actual=tuple(result.shape),
            tensor_name="result",
        )
    truth = baseline.detach().double()
    error = (result.detach().double() - truth).abs()
    large = truth.abs() > 1e-6
    relative = (error[large] / truth[large].abs()).mean() if bool(large.any()) else error.sum() * 0
    return BaselineComparison(float(error.max()), float(error.mean()), float(relative))
