"""An FP8 dgrad of any shape, block, stride and dtype, against float64 on the same operands."""

from __future__ import annotations

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fp8dispatch import fp8_linear, use_backend  # noqa: E402
from fp8dispatch.formats import ACTIVATION_DTYPES  # noqa: E402
from fp8dispatch.recipe import ROW, TENSOR, Granularity, Recipe  # noqa: E402
from tests import fp8_gradients, oracle  # noqa: E402

sizes = st.integers(1, 150)
blocks = st.builds(
    lambda rows, columns: Recipe(Granularity.BLOCK, (rows, columns)),
    st.integers(2, 160),
    st.integers(1, 160),
)


@given(
    m=st.integers(0, 20),
    n=sizes,
    k=sizes,
    recipe=st.one_of(st.just(TENSOR), st.just(ROW), blocks),
    x_dtype=st.sampled_from(ACTIVATION_DTYPES),
    grad_dtype=st.sampled_from(ACTIVATION_DTYPES),
    transposed=st.booleans(),
    padded=st.booleans(),
    backend=st.sampled_from(["eager", "triton"]),
    seed=st.integers(0, 2**31),
)
def test_any_call(
    m: int, n: int, k: int, recipe: Recipe, x_dtype: torch.dtype, grad_dtype: torch.dtype,
    transposed: bool, padded: bool, backend: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    weight, scale = oracle.make_weight(n, k, recipe)
    grad = torch.randn(m, n).to(grad_dtype)
    expected = fp8_gradients.truth(grad, weight, scale, recipe)
    if transposed and n != k:
        weight, scale = weight.t(), scale.t() if scale.dim() == 2 else scale
        scale = scale if recipe.block_size is not None else scale.reshape(-1)
    if padded:
        grad = torch.nn.functional.pad(grad, (3, 2))[:, 3 : 3 + n]
    x = torch.randn(m, k).to(x_dtype).requires_grad_()
    with use_backend(backend, dgrad="fp8"):
        out = fp8_linear(x, weight, scale, block_size=recipe.block_size, out_dtype=grad_dtype)

    (got,) = torch.autograd.grad(out, x, grad)

    assert (got.shape, got.dtype) == (x.shape, x_dtype)
    if m:
        oracle.assert_matches(got, expected, min_sqnr=0)
