"""Sorted rows in places that libraries want them in, aligned or masked.

Aligned: all in one matrix, each expert's from a multiple of some rows on. Masked: a block of places
for each expert. The number of places depends on shapes alone, so nothing waits for the device:
those without a row are marked.
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
        expert: int32 [P], the expert of each place, in whose first places its rows stand; -1 behind
            them. A row whose indices lead nowhere keeps its place, since a library may take the
            expert of a whole tile from its first row (DeepGEMM does).
        source: int64 [P], row of the input of each place; 0 where it has none.
        target: int64 [P], row of the output of each place; the number of rows where it has none.
        sizes: int64 [E], places of each expert, which lie one behind the other from the first place
            on; their sum is at most P.
    """

    expert: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    sizes: torch.Tensor


@dataclass(frozen=True)
class MaskedRows:
    """Places for sorted rows in the block of their expert.

    Attributes:
        counts: int32 [E], rows of each expert, which fill the first places of its block.
        expert: int64 [rows], the block of each sorted row; E where it belongs to no expert.
        place: int64 [rows], its place in that block.
        source: int64 [rows], its row of the input; 0 where it has none.
        target: int64 [rows], its row of the output; the number of rows where it has none.
    """

    counts: torch.Tensor
    expert: torch.Tensor
    place: torch.Tensor
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
    source, target, leads = _ends_of(sorted_rows, inputs, row)
    owned = within < counts[expert]
    filled = owned & leads
    return AlignedRows(
        torch.where(owned, expert, -1).to(torch.int32),
        torch.where(filled, source, 0),
        torch.where(filled, target, rows),
        room,
    )


def mask_rows(sorted_rows: SortedRows, inputs: int) -> MaskedRows:
    """Count the rows of each expert, and each row among those of its expert.

    Args:
        inputs: rows of the input; a row whose indices leave it, or the output, keeps its place and
            takes the first row of the input to no row of the output.
    """
    rows, experts = sorted_rows.rows, sorted_rows.ends.shape[0]
    ends = clamped_ends(sorted_rows)
    starts = torch.cat([ends.new_zeros(1), ends])
    row = torch.arange(rows, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)
    place = torch.where(expert < experts, row - starts[expert], 0)
    source, target, leads = _ends_of(sorted_rows, inputs, row)
    leads &= expert < experts
    return MaskedRows(
        (ends - starts[:-1]).to(torch.int32),
        expert,
        place,
        torch.where(leads, source, 0),
        torch.where(leads, target, rows),
    )


def scales_by_expert(scale: torch.Tensor, places: AlignedRows, groups: int) -> torch.Tensor:
    """Scales of aligned rows as one block [groups, sizes[e]] for each expert, end to end.

    Args:
        scale: fp32 [T, groups] of the input's rows, or one for all.

    Returns:
        fp32 [P * groups], contiguous; places without a row have scale 1.
    """
    count, device = places.source.shape[0], scale.device
    if scale.numel() == 1:
        return scale.reshape(1).expand(count * groups).contiguous()
    expert = places.expert.long().clamp(min=0)
    starts = places.sizes.cumsum(0) - places.sizes
    start, size = starts[expert], places.sizes[expert]
    within = torch.arange(count, device=device) - start
    at = (start * groups + within).unsqueeze(1) + size.unsqueeze(1) * torch.arange(
        groups, device=device
    )
    filled = (places.expert >= 0).unsqueeze(1)
    # What stands nowhere goes behind the end.
    blocks = torch.ones(count * groups + 1, dtype=torch.float32, device=device)
    blocks[torch.where(filled, at, count * groups)] = scale[places.source]
    return blocks[:-1]


def _ends_of(
    sorted_rows: SortedRows, inputs: int, row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the input and of the output of some sorted rows, and whether both are there."""
    source = row if sorted_rows.gather is None else sorted_rows.gather[row].long()
    target = row if sorted_rows.scatter is None else sorted_rows.scatter[row].long()
    leads = (source >= 0) & (source < inputs) & (target >= 0) & (target < sorted_rows.rows)
    return source, target, leads
