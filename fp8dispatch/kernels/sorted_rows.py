"""What the kernels of expert matmuls are told about routing: rows that are sorted, or that say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SortedRows:
    """Rows sorted by expert, as tensors on the device; nobody has looked at their values.

    Attributes:
        ends: ``[E]``, any integer dtype and stride: inclusive cumulative ends, to be clamped.
        rows: Number of sorted rows, and rows of the output.
        gather: ``[rows]`` integers, row of the input of each; None where it is the same.
        scatter: ``[rows]`` integers, row of the output of each; None where it is the same.
        complete: Every row of the output is written: there is no `scatter`, or it is a permutation.
        distinct: No row of the input is used twice: there is no `gather`, or it is a permutation.
    """

    ends: torch.Tensor
    rows: int
    gather: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    complete: bool = False
    distinct: bool = False


@dataclass(frozen=True, slots=True)
class NamedRows:
    """Few rows in any order, each with the number of its expert.

    Attributes:
        expert_ids: ``[rows]``, any integer dtype, stride and values.
        rows: Number of rows, of the output too.
        gather: ``[rows]`` integers, row of the input of each; None where it is the same.
    """

    expert_ids: torch.Tensor
    rows: int
    gather: torch.Tensor | None = None
