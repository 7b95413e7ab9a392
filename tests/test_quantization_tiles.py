"""Activations with one scale for each tile of tokens: the numbers, tile by tile."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch.formats import FLOAT8_DTYPES, dtype_name, max_value
from fp8dispatch.quantization.activation import quantize_activation

pytest.importorskip("hypothesis", reason="the GPU machine keeps its own packages")

from hypothesis import given
from hypothesis import strategies as st

E4M3 = torch.float8_e4m3fn


def check(x: torch.Tensor, group: int, rows: int, dtype: torch.dtype, pad: int = 1) -> None:
    """Each tile against its own arithmetic, written out here."""
    m, k = x.shape
    made = quantize_activation(x, group, dtype, pad_rows_to=pad, rows_per_scale=rows)
    padded = -(-m // pad) * pad
    group = min(group, k)
    assert made.data.shape == (padded, k)
    assert made.data.dtype == dtype
    assert made.scale.shape == (-(-padded // rows), -(-k // group))
    assert not made.data[m:].view(torch.uint8).any()
    bad = ~torch.isfinite(x).all(1)
    assert torch.isnan(made.data.float()[:m]).all(1).equal(bad)
    for i in range(made.scale.shape[0]):
        good = [r for r in range(i * rows, min((i + 1) * rows, m)) if not bad[r]]
        for j in range(made.scale.shape[1]):
            part = slice(j * group, (j + 1) * group)
            tile = x[good, part].float()
            amax = tile.abs().max() if tile.numel() else torch.tensor(0.0)
            limit = torch.tensor(max_value(dtype))
            scale = amax.clamp(min=1e-12) / limit if amax > 0 else torch.tensor(1.0)
            assert made.scale[i, j] == scale
            codes = (tile / scale).clamp(-limit, limit).to(dtype)
            assert torch.equal(made.data[good, part].float(), codes.float())


@given(
    m=st.integers(0, 40),
    k=st.integers(1, 40),
    group=st.sampled_from([1, 8, 16, 64]),
    rows=st.sampled_from([2, 8, 16]),
    dtype=st.sampled_from(FLOAT8_DTYPES),
    x_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    pad=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 2**31),
)
def test_every_tile_has_its_own_scale(
    m: int,
    k: int,
    group: int,
    rows: int,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    pad: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).abs().to(x_dtype)  # a zero has no sign in FNUZ
    x[: seed % 30] = 0  # whole tiles of zeros, often
    for value in (torch.nan, torch.inf, -torch.inf):
        if m and seed % 3:
            row, column = (int(torch.randint(size, (), generator=generator)) for size in (m, k))
            x[row, column] = value
    check(x, group, rows, dtype, pad)


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", [0, 1, 128, 130])
def test_the_tiles_of_the_block_recipe(m: int, dtype: torch.dtype) -> None:
    x = torch.randn(m, 272).abs()
    x[1:, 128:] *= 1e30
    x[2:3] = torch.nan
    check(x, 128, 128, dtype)


def test_a_tile_without_a_finite_row_spoils_nothing_else() -> None:
    x = torch.randn(256, 128)
    x[:128, 0] = torch.inf
    made = quantize_activation(x, 128, E4M3, rows_per_scale=128)

    assert made.scale[0, 0] == 1
    assert torch.isnan(made.data[:128].float()).all()
    assert torch.isfinite(made.data[128:].float()).all()


def test_a_static_scale_knows_no_tiles() -> None:
    x, static = torch.randn(5, 64), torch.tensor([0.01])
    tiles = quantize_activation(x, 16, E4M3, static, rows_per_scale=4)
    plain = quantize_activation(x, 16, E4M3, static, use_kernels=False)

    assert torch.equal(tiles.data.float(), plain.data.float())
    assert tiles.scale.shape == (1, 1)


def test_asking_for_kernels_gives_tiles_all_the_same() -> None:
    x = torch.randn(9, 64)
    made = quantize_activation(x, 16, E4M3, use_kernels=True, rows_per_scale=4)
    assert made.scale.shape == (3, 4)
