"""Where rows go before a grouped GEMM and whence they come back, for any routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch.kernels.sorted_rows import SortedRows
from fp8dispatch.moe.aligned import align_rows, mask_rows, scales_by_expert
from fp8dispatch.moe.routing import Routing


@pytest.mark.parametrize("experts", [1, 3, 40])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("multiple", [1, 8])
def test_there_are_places_for_every_routing(experts: int, rows: int, multiple: int) -> None:
    ids = torch.randint(-1, experts + 1, (rows,))
    for chosen in (ids, torch.zeros_like(ids), torch.arange(rows) % experts):
        routing = Routing(experts, rows, rows, expert_ids=chosen)
        places = align_rows(routing.sort(use_kernels=False), rows, multiple)

        filled = places.expert >= 0
        named = sorted(places.source[filled].tolist())
        assert named == [row for row, e in enumerate(chosen.tolist()) if 0 <= e < experts]
        assert torch.equal(chosen[places.source[filled]], places.expert[filled].long())
        assert torch.equal(places.source[filled], places.target[filled])
        assert set(places.target[~filled].tolist()) <= {rows}
        for tile in places.expert.reshape(-1, multiple):
            assert tile[tile >= 0].unique().numel() <= 1


@st.composite
def sorted_rows(draw: st.DrawFn) -> tuple[SortedRows, int]:
    """Any offsets, as a caller may give them, and indices that may lead nowhere."""
    experts, rows = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    inputs = draw(st.integers(1, rows))
    value = st.integers(-5, rows + 5)
    ends = torch.tensor(draw(st.lists(value, min_size=experts, max_size=experts)))
    gather = torch.tensor(draw(st.lists(value, min_size=rows, max_size=rows)))
    scatter = torch.tensor(draw(st.permutations(range(rows))))
    scatter[scatter == draw(st.integers(0, rows - 1))] = rows + 3
    return SortedRows(ends, rows, gather, scatter), inputs


def expected_pairs(case: tuple[SortedRows, int]) -> list[tuple[int, int, int]]:
    """Expert, source and target of each row that is to be computed, one after the other."""
    routed, inputs = case
    assert routed.gather is not None
    assert routed.scatter is not None
    pairs, begin = [], 0
    for expert, end in enumerate(routed.ends.tolist()):
        stop = min(max(end, begin), routed.rows)
        for row in range(begin, stop):
            source, target = int(routed.gather[row]), int(routed.scatter[row])
            if 0 <= source < inputs and 0 <= target < routed.rows:
                pairs.append((expert, source, target))
        begin = stop
    return pairs


@given(sorted_rows(), st.sampled_from([1, 4, 16]))
def test_aligned_places_lead_where_the_indices_do(case: tuple[SortedRows, int], by: int) -> None:
    routed, inputs = case
    places = align_rows(routed, inputs, by)

    filled = places.target < routed.rows
    columns = (places.expert[filled], places.source[filled], places.target[filled])
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    assert found == expected_pairs(case)
    ends = places.sizes.cumsum(0)
    owner = torch.searchsorted(ends, torch.arange(filled.shape[0]), right=True)
    assert torch.equal(owner[filled], places.expert[filled].long())
    assert int(ends[-1]) <= filled.shape[0]
    assert not bool((places.sizes % by).any())
    assert places.sizes.dtype == torch.int64
    assert set(places.target[~filled].tolist()) <= {routed.rows}
    assert set(places.source[~filled].tolist()) <= {0}


@given(sorted_rows())
def test_masked_places_lead_where_the_indices_do(case: tuple[SortedRows, int]) -> None:
    routed, inputs = case
    masked = mask_rows(routed, inputs)

    leads = masked.target < routed.rows
    columns = (masked.expert[leads], masked.source[leads], masked.target[leads])
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    assert found == expected_pairs(case)
    experts = masked.counts.shape[0]
    for expert in range(experts):
        taken = masked.place[masked.expert == expert]
        assert taken.tolist() == list(range(int(masked.counts[expert])))
    assert set(masked.place[masked.expert == experts].tolist()) <= {0}
    assert int(masked.source.max()) < inputs


@given(sorted_rows(), st.integers(1, 3), st.booleans())
def test_scales_lie_by_expert_and_then_by_group(
    case: tuple[SortedRows, int], groups: int, single: bool
) -> None:
    routed, inputs = case
    places = align_rows(routed, inputs, 4)
    shape = (1, 1) if single else (inputs, groups)
    scale = torch.rand(shape) + 0.5

    blocks = scales_by_expert(scale, places, groups)

    assert blocks.shape == (places.source.shape[0] * groups,)
    assert blocks.is_contiguous()
    begin = 0
    for expert, size in enumerate(places.sizes.tolist()):
        block = blocks[begin * groups : (begin + size) * groups].view(groups, size)
        for within in range(size):
            if int(places.expert[begin + within]) == expert:
                source = int(places.source[begin + within])
                wanted = scale.expand(inputs, groups)[source]
                assert torch.equal(block[:, within], wanted)
        begin += size
