"""Which rows go to which expert, as tensors on the device that nothing has to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fp8dispatch.checks import is_traced
from fp8dispatch.errors import BackendUnavailableError, InvalidInputError
from fp8dispatch.kernels.sorted_rows import SortedRows
from fp8dispatch.probes.device import runs_kernels


@dataclass(frozen=True)
class Routing:
    """The routing of one call as the caller gives it; exactly one of ids and offsets is there.

    Attributes:
        experts: number of experts, E.
        rows: rows of the output.
        inputs: rows of the activations.
        expert_ids: [rows] integers, the expert of each row: a batched call.
        offsets: [E] integers, inclusive cumulative ends of sorted rows: a grouped call.
        gather: [rows] integers, row of the activations of each row; None where it is the same.
        scatter: [rows] integers, row of the output of each sorted row; None where it is the same.
    """

    experts: int
    rows: int
    inputs: int
    expert_ids: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    gather: torch.Tensor | None = None
    scatter: torch.Tensor | None = None

    def sort(self, *, use_kernels: bool) -> SortedRows:
        """The rows sorted by expert; ids of no expert go last, offsets stay as they are."""
        if self.offsets is not None:
            return SortedRows(
                self.offsets,
                self.rows,
                self.gather,
                self.scatter,
                complete=self.scatter is None,
                distinct=self.gather is None,
            )
        assert self.expert_ids is not None  # one of the two is there
        order, ends = sort_ids(self.expert_ids, self.experts, use_kernels=use_kernels)
        gather = order if self.gather is None else self.gather[order]
        return SortedRows(
            ends, self.rows, gather, order, complete=True, distinct=self.gather is None
        )


def sort_ids(
    expert_ids: torch.Tensor, experts: int, *, use_kernels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort rows by expert, stably, without waiting; ids below 0 or from `experts` on go last.

    Returns:
        The row at each place, int32 [T], and inclusive cumulative ends, int32 [E].
    """
    if use_kernels:
        # Imported here because it imports Triton, which is not a requirement of the package.
        from fp8dispatch.kernels import experts_routing

        if expert_ids.shape[0] <= experts_routing.LONGEST_COUNTED:
            device = expert_ids.device
            order = torch.empty(expert_ids.shape, dtype=torch.int32, device=device)
            ends = torch.empty(experts, dtype=torch.int32, device=device)
            experts_routing.sort_ids(expert_ids, order, ends)
            return order, ends
    ids = expert_ids.long()
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
    in_order = torch.sort(ids, stable=True)
    bounds = torch.arange(experts, device=ids.device)
    ends = torch.searchsorted(in_order.values, bounds, right=True).to(torch.int32)
    return in_order.indices.to(
        torch.int32
    ), ends  # as from the kernel: one kernel behind serves both


def sort_by_expert(expert_ids: torch.Tensor, experts: int) -> SortedRows:
    """Rows that name their expert, sorted for a grouped call; also under torch.compile.

    Args:
        expert_ids: [T], any integer dtype and stride; checked by the caller.
        experts: number of experts, E.

    Returns:
        ends [E], and the same permutation as `gather` and as `scatter`. Rows of no expert, by ids
        below 0 or from E on, are behind the last end.
    """
    use_kernels = not is_traced(expert_ids, expert_ids) and runs_kernels(expert_ids.device)
    order, ends = sort_ids(expert_ids, experts, use_kernels=use_kernels)
    return SortedRows(ends, expert_ids.shape[0], order, order, complete=True, distinct=True)


def clamped_ends(sorted_rows: SortedRows) -> torch.Tensor:
    """Group ends, int64 [E], that rise and lie within the rows, whatever the offsets are."""
    return sorted_rows.ends.long().cummax(0).values.clamp(0, sorted_rows.rows)


def expert_rows(
    sorted_rows: SortedRows, inputs: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For plain torch: each expert that has rows, with its sorted rows, and whence and whither.

    It reads the group ends, which waits for the device.

    Yields:
        expert, and int64 vectors of equal length: sorted rows, rows of the input, of the output.
        Rows whose index leads nowhere are left out.

    Raises:
        BackendUnavailableError: a CUDA graph is being captured.
    """
    device = sorted_rows.ends.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendUnavailableError(
            "eager needs to read how many rows each expert has, found a CUDA graph being captured; "
            "use the backend triton, which does not"
        )
    start = 0
    for expert, end in enumerate(clamped_ends(sorted_rows).tolist()):
        rows, start = torch.arange(start, end, device=device), end
        source = rows if sorted_rows.gather is None else sorted_rows.gather[rows].long()
        target = rows if sorted_rows.scatter is None else sorted_rows.scatter[rows].long()
        kept = (source >= 0) & (source < inputs) & (target >= 0) & (target < sorted_rows.rows)
        if bool(kept.any()):
            yield expert, rows[kept], source[kept], target[kept]


def check_values(routing: Routing) -> None:
    """Read the values of a grouped call, which waits for the device, and refuse what is clamped.

    Raises:
        InvalidInputError: offsets that fall or leave the rows, indices out of range, or two rows
            that are written to one place.
    """
    named = {
        name: values
        for name, values in (
            ("offsets", routing.offsets),
            ("gather", routing.gather),
            ("scatter", routing.scatter),
        )
        if values is not None
    }
    sizes = [values.shape[0] for values in named.values()]
    # All in one copy, which waits once.
    copied = torch.cat([values.long() for values in named.values()]).cpu()
    on_host = dict(zip(named, torch.split(copied, sizes), strict=True))
    rows = routing.rows
    ends = on_host["offsets"].tolist()
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
    for name, size in (("gather", routing.inputs), ("scatter", rows)):
        if name not in on_host:
            continue
        values = on_host[name][: ends[-1]]
        wrong = values[(values < 0) | (values >= size)]
        if wrong.numel():
            raise InvalidInputError(
                f"{name} must hold rows from 0 to {size - 1}, found {int(wrong[0])} before the "
                f"last offset; rows that go nowhere belong behind it"
            )
        uses = torch.bincount(values, minlength=1)
        if name == "scatter" and int(uses.max()) > 1:
            raise InvalidInputError(
                f"scatter must name each row of the output once, found {int(uses.argmax())} more "
                f"than once; sum the rows of one token after the call"
            )
