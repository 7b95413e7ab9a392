"""Which rows go to which expert, as tensors on the device that nothing has to wait for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8dispatch.errors import InvalidInputError


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert: where the rows of each expert end, and where each row lies.

    Attributes:
        ends: int32 [E], inclusive cumulative ends, clamped: they rise, within 0 and `rows`. What
            lies behind the last one belongs to no expert.
        rows: number of sorted rows, and of rows of the output.
        gather: row of the activations of each sorted row, int [rows]; None where it is the same.
        scatter: row of the output of each sorted row, int [rows]; None where it is the same.
        complete: `scatter` is known to reach every row of the output.
    """

    ends: torch.Tensor
    rows: int
    gather: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    complete: bool = True


def clamp_ends(offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """Group ends that rise and lie within the rows, whatever the values of `offsets` are."""
    # Clamped in 64 bits: in 32 a large end would come out negative.
    return offsets.long().cummax(0).values.clamp(0, rows).to(torch.int32)


def sort_by_expert(expert_ids: torch.Tensor, experts: int) -> Routing:
    """The routing of rows that say their expert; ids below 0 or from `experts` on go last."""
    ids = expert_ids.long()
    known = (ids >= 0) & (ids < experts)
    ids = torch.where(known, ids, experts)
    order = torch.sort(ids, stable=True).indices
    bounds = torch.arange(experts, device=ids.device)
    ends = torch.searchsorted(ids[order], bounds, right=True).to(torch.int32)
    return Routing(ends, ids.shape[0], order, order)


def check_values(
    offsets: torch.Tensor,
    rows: int,
    gather: torch.Tensor | None,
    scatter: torch.Tensor | None,
    inputs: int,
) -> None:
    """Read the values of a grouped call, which waits for the device, and refuse what is clamped.

    Raises:
        InvalidInputError: offsets that fall or leave the rows, indices out of range, or two rows
            that are written to one place.
    """
    ends = offsets.tolist()
    for index, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end < before:
            raise InvalidInputError(
                f"offsets must rise from 0, found {end} after {before} at index {index}; pass "
                f"inclusive cumulative ends, torch.cumsum(rows_per_expert, 0)"
            )
        if end > rows:
            raise InvalidInputError(
                f"offsets must not exceed the {rows} sorted rows, found {end} at index {index}; "
                f"pass inclusive cumulative ends of these rows"
            )
    for name, values, size in (("gather", gather, inputs), ("scatter", scatter, rows)):
        if values is None:
            continue
        wrong = values[(values < 0) | (values >= size)]
        if wrong.numel():
            raise InvalidInputError(
                f"{name} must hold rows from 0 to {size - 1}, found {int(wrong[0])}; rows that go "
                f"nowhere belong behind the last offset"
            )
    if scatter is not None:
        named = int(torch.bincount(scatter.long(), minlength=rows).count_nonzero())
        if named != rows:
            raise InvalidInputError(
                f"scatter must name each of the {rows} output rows once, found {named} different "
                f"ones; reduce duplicates after the call"
            )
