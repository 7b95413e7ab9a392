"""Sorted rows in places that libraries want them in: each expert's from a multiple of some rows on.

The number of places depends on shapes alone, so nothing waits for the device: rows that no expert
fills are marked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8dispatch.kernels.sorted_rows import SortedRows
from fp8dispatch.moe.routing import clamped_ends


@dataclass(frozen=True)
class AlignedRows:
    """Places for the rows of every expert, P of them.

    Attributes:
        expert: int32 [P], the expert of each place; -1 where no row stands.
        source: int64 [P], row of the input of each place; 0 where no row stands.
        target: int64 [P], row of the output of each place; the number of rows where none stands.
    """

    expert: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor


def align_rows(sorted_rows: SortedRows, inputs: int, multiple: int) -> AlignedRows:
    """Lay out sorted rows so that each expert's begin at a multiple of `multiple`.

    Args:
        inputs: rows of the input; indices that leave it, or the output, leave their place empty.
    """
    rows, experts = sorted_rows.rows, sorted_rows.ends.shape[0]
    ends = clamped_ends(sorted_rows)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    counts = ends - starts
    room = (counts + multiple - 1) // multiple * multiple
    last = room.cumsum(0)
    # Every expert may waste all but one row of its last piece.
    places = (rows + min(experts, rows) * (multiple - 1)) // multiple * multiple
    place = torch.arange(places, device=ends.device)
    expert = torch.searchsorted(last, place, right=True).clamp(max=experts - 1)
    within = place - (last - room)[expert]
    row = (starts[expert] + within).clamp(max=max(rows - 1, 0))
    source = row if sorted_rows.gather is None else sorted_rows.gather[row].long()
    target = row if sorted_rows.scatter is None else sorted_rows.scatter[row].long()
    filled = (within < counts[expert]) & (source >= 0) & (source < inputs)
    filled &= (target >= 0) & (target < rows)
    return AlignedRows(
        torch.where(filled, expert, -1).to(torch.int32),
        torch.where(filled, source, 0),
        torch.where(filled, target, rows),
    )
