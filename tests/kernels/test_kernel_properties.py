"""Kernels over floating operands hold for any shape, block and stride: under the interpreter alone.

On a GPU each block size would be compiled; the fixed cases of the other files run there.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis", reason="the GPU machine keeps its own packages")

from hypothesis import given, settings
from hypothesis import strategies as st

from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.kernels.grad_input import grad_input
from fp8dispatch.kernels.interpreter import INTERPRETED
from fp8dispatch.recipe import Granularity, Recipe
from tests import oracle

pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="compiles each case on a GPU")


@settings(max_examples=30)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    block=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    dtype=st.sampled_from(ACTIVATION_DTYPES),
    transposed=st.booleans(),
)
def test_gradient_of_any_shape_and_block(
    m: int,
    n: int,
    k: int,
    block: tuple[int, int],
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    recipe = Recipe(Granularity.BLOCK, block)
    data, scale = oracle.make_weight(n, k, recipe)
    if transposed:
        data, scale = data.t().contiguous().t(), scale.t().contiguous().t()
    grad = torch.randn(m, n).to(dtype)

    grid = (-(-n // block[0]), -(-k // block[1]))
    got = torch.empty(m, k, dtype=dtype)

    grad_input(grad, data, scale.reshape(grid), got, block)

    # A row of few columns may be one value that cancels: each element's bound judges alone.
    oracle.assert_gradient(
        got, grad, oracle.dequantized_weight(data, scale, recipe), min_sqnr=-torch.inf
    )
