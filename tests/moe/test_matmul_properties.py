"""Random calls of expert matmuls: routing, shapes, recipes, dtypes, against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

from tests import oracle
from tests.moe.cases import RECIPES, WAYS, Call, make_call

pytest.importorskip("hypothesis", reason="random cases are drawn by hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def calls(draw: st.DrawFn, *, most_rows: int) -> Call:
    """A call of any kind; its tensors depend on the drawn seed alone."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return make_call(
        draw(st.sampled_from(WAYS)),
        draw(st.sampled_from(sorted(RECIPES.items())))[1],
        draw(st.sampled_from((1, 2, 3, 8, 60, 128, 256))),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 72)),
        draw(st.integers(1, most_rows)),
        sentinels=draw(st.sampled_from((0.0, 0.2, 0.5, 0.9))),
        concentrated=draw(st.booleans()),
        bias=draw(st.sampled_from((None, torch.float32, torch.bfloat16))),
        static=draw(st.sampled_from(("none", "none", "one", "each"))),
        x_dtype=draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        scale_dtype=draw(st.sampled_from((torch.float32, torch.float8_e8m0fnu))),
        index_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
    )


@given(calls(most_rows=40))
def test_plain_torch_matches_the_oracle(call: Call) -> None:
    oracle.assert_matches(call.run(backend="eager"), call.truth(), min_sqnr=-math.inf)


@settings(max_examples=15)
@given(calls(most_rows=20))
def test_triton_matches_the_oracle(call: Call) -> None:
    oracle.assert_matches(call.run(backend="triton"), call.truth(), min_sqnr=-math.inf)
