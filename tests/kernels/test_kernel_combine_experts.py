"""The kernels of the weighted sum over experts equal plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch.kernels.combine_experts import combine_rows, combine_rows_backward

EXPERTS = 9
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}


def make(
    tokens: int, top_k: int, hidden: int, dtype: torch.dtype, share_dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, ids and shares; slots of no expert hold NaN where they must not be read."""
    ids = torch.randint(-2, EXPERTS + 2, (tokens * top_k,))
    unknown = (ids < 0) | (ids >= EXPERTS)
    rows = torch.randn(tokens * top_k, hidden).masked_fill(unknown[:, None], torch.nan).to(dtype)
    shares = torch.rand(tokens, top_k).masked_fill(unknown.view(tokens, top_k), torch.inf)
    return rows.to(device), ids.to(device), shares.to(share_dtype).to(device)


def clean(
    rows: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 rows [T, k, H] and shares [T, k], zero where the id names no expert."""
    unknown = ((ids < 0) | (ids >= EXPERTS)).view(shares.shape)
    wide = rows.double().view(*shares.shape, rows.shape[1])
    return wide.masked_fill(unknown[..., None], 0), shares.double().masked_fill(unknown, 0)


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (7, 3), (3, 8)])
@pytest.mark.parametrize("hidden", [1, 100, 1500])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("share_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_and_gradients(
    tokens: int,
    top_k: int,
    hidden: int,
    dtype: torch.dtype,
    share_dtype: torch.dtype,
    device: str,
) -> None:
    rows, ids, shares = make(tokens, top_k, hidden, dtype, share_dtype, device)
    out = torch.empty(tokens, hidden, dtype=dtype, device=device)
    grad = torch.randn(tokens, hidden, device=device).to(dtype)
    grad_rows, grad_shares = torch.empty_like(rows), torch.empty_like(shares)

    combine_rows(rows, ids, shares, EXPERTS, out)
    combine_rows_backward(grad, rows, ids, shares, EXPERTS, grad_rows, grad_shares)

    values, counted = clean(rows, ids, shares)
    wide = grad.double().unsqueeze(1)
    known = ((ids >= 0) & (ids < EXPERTS)).view(shares.shape)
    for got, terms, dim in (
        (out, values * counted.unsqueeze(-1), 1),
        (grad_rows.view(values.shape), (wide * counted.unsqueeze(-1)).unsqueeze(-1), -1),
        (grad_shares, wide * values * known.unsqueeze(-1), -1),
    ):
        expected, mass = terms.sum(dim), terms.abs().sum(dim)
        bound = TOLERANCE[got.dtype] * expected.abs() + 2.0**-20 * mass + 1e-7
        assert bool(((got.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("id_dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_strides_and_small_ids(id_dtype: torch.dtype, device: str) -> None:
    tokens, top_k, hidden = 5, 2, 33
    wide = torch.randn(hidden, tokens * top_k, device=device)
    ids = torch.randint(0, EXPERTS, (tokens * top_k, 2), device=device).to(id_dtype)
    shares = torch.rand(top_k, tokens, device=device)
    out = torch.empty(hidden, tokens, device=device)

    combine_rows(wide.t(), ids[:, 1], shares.t(), EXPERTS, out.t())

    rows = wide.t().reshape(tokens, top_k, hidden).double()
    torch.testing.assert_close(out.t().double(), (rows * shares.t().unsqueeze(-1)).sum(1))


def test_nothing_to_do(device: str) -> None:
    empty = torch.empty(0, 4, device=device)
    ids = torch.empty(0, dtype=torch.int64, device=device)
    combine_rows(empty, ids, torch.empty(0, 2, device=device), EXPERTS, empty)
    out = torch.ones(3, 4, device=device)

    combine_rows(empty, ids, torch.empty(3, 0, device=device), EXPERTS, out)

    assert not out.any()
