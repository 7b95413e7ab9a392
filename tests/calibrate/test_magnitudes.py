"""Histograms: exact counts, exact merging, percentiles within a bin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch.calibrate.magnitudes import (
    BIN_COUNT,
    BINS_PER_OCTAVE,
    Magnitudes,
    bin_edges,
)

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


def bin_by_logarithm(value: float) -> int:
    """The bin of a normal fp32 magnitude, from its exponent and its place within the octave."""
    mantissa, exponent = math.frexp(value)  # mantissa in [0.5, 1)
    place = math.floor((mantissa * 2 - 1) * BINS_PER_OCTAVE)
    return (exponent - 1 + 127) * BINS_PER_OCTAVE + place


@given(st.lists(finite.filter(lambda value: value == 0 or abs(value) >= 2.0**-126)))
def test_counts_are_those_of_the_definition(values: list[float]) -> None:
    found = Magnitudes.of(torch.tensor(values))

    expected = torch.zeros(BIN_COUNT, dtype=torch.int64)
    for value in values:
        if value:
            expected[bin_by_logarithm(abs(value))] += 1
    assert torch.equal(found.counts, expected)
    assert (found.values, found.zeros) == (len(values), sum(value == 0 for value in values))
    assert found.amax == max((abs(value) for value in values), default=0.0)


@given(st.lists(st.lists(st.floats(width=32)), max_size=5))
def test_parts_add_up_to_the_whole(parts: list[list[float]]) -> None:
    whole = Magnitudes.of(torch.tensor([value for part in parts for value in part]))
    added = Magnitudes()
    for part in parts:
        added.add(Magnitudes.of(torch.tensor(part)))

    assert torch.equal(added.counts, whole.counts)
    assert vars(added) | {"counts": None} == vars(whole) | {"counts": None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_device_and_dtype_counts_alike(dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(50, 40) * torch.logspace(-8, 4, 40)).to(dtype)
    x[3, 4], x[5, 6], x[7, 8], x[0] = torch.nan, torch.inf, -torch.inf, 0

    found = Magnitudes.of(x.to(device).t())  # any strides

    clean = x.float().flatten()
    wide = clean[clean.isfinite()].abs()
    assert (found.values, found.nonfinite) == (2000 - 3, 3)
    assert found.zeros == int((wide == 0).sum()) >= 40
    assert found.amax == float(wide.max())
    assert int(found.counts.sum()) == found.values - found.zeros


@given(st.lists(finite, min_size=1, max_size=60), st.sampled_from([1, 25, 50, 90, 99.9, 100]))
def test_a_percentile_is_within_its_bin(values: list[float], q: float) -> None:
    found = Magnitudes.of(torch.tensor(values)).percentile(q)

    ordered = sorted(abs(value) for value in values)
    exact = ordered[max(math.ceil(q / 100 * len(ordered)), 1) - 1]
    edges = bin_edges().tolist()
    if exact == 0:
        assert found <= edges[1]
    else:
        at = max(index for index in range(BIN_COUNT) if edges[index] <= exact)
        assert edges[at] <= found <= edges[at + 1]
    assert found <= ordered[-1]


def test_shares_of_what_is_clipped_and_what_is_lost() -> None:
    x = torch.tensor([0.0] * 10 + [2.0**-30] * 20 + [1.0] * 60 + [100.0] * 10)
    found = Magnitudes.of(x)

    assert found.share_above(50.0) == pytest.approx(0.1)
    assert found.share_above(100.0) == 0
    assert found.share_lost_below(2.0**-20) == pytest.approx(0.2), "zeros are not lost"
    assert found.share_lost_below(1000.0) == pytest.approx(0.9)
    assert found.share_lost_below(2.0**-40) == 0


def test_nothing_has_no_magnitudes() -> None:
    nothing = Magnitudes.of(torch.empty(0, 4))
    assert (nothing.values, nothing.amax, nothing.percentile(99)) == (0, 0.0, 0.0)
    assert (nothing.share_above(1), nothing.share_lost_below(1)) == (0, 0)
    spoilt = Magnitudes.of(torch.tensor([torch.nan, torch.inf]))
    assert (spoilt.values, spoilt.nonfinite, spoilt.amax) == (0, 2, 0.0)


def test_edges_are_a_sixteenth_of_an_octave_apart() -> None:
    edges = bin_edges()
    normal = edges[BINS_PER_OCTAVE:]
    ratios = normal[1:] / normal[:-1]
    assert float(ratios.max()) <= 1 + 1 / 16
    assert float(ratios[:-1].min()) >= 1 + 1 / 32
    assert float(edges[-1]) == torch.finfo(torch.float32).max
