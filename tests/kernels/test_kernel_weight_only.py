"""The GEMM over unquantised activations, against float64 of those and the dequantised weight."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES
from fp8dispatch.kernels.gemm_config import GemmConfig, choose_config, fit_wide
from fp8dispatch.kernels.launch import DeviceLimits
from fp8dispatch.kernels.scaled_gemm import scaled_gemm
from fp8dispatch.quantization.weight import block_of
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.oracle import RECIPES, name_of

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
inputs = pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=name_of)


def run(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    recipe: Recipe,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    n, k = data.shape
    block = recipe.block_size
    rows, columns = block_of(recipe, n, k) if block is None else block
    grid = scale.reshape(-(-n // rows), -(-k // columns))
    grid = grid.expand(n, 1) if block is None else grid
    out = torch.empty(x.shape[0], n, dtype=out_dtype or x.dtype, device=x.device)
    scaled_gemm(x, None, data, grid, bias, out, block)
    return out


@inputs
@every_recipe
def test_every_recipe_and_dtype(recipe: Recipe, dtype: torch.dtype, device: str) -> None:
    data, scale = oracle.make_weight(45, 140, recipe, device=device)
    x = torch.randn(19, 140, device=device).to(dtype)
    bias = torch.randn(45, device=device)

    out = run(x, data, scale, recipe, bias)

    wide = oracle.dequantized_weight(data, scale, recipe)
    oracle.assert_matches(out, oracle.truth(x.double(), wide, bias))


@inputs
@pytest.mark.parametrize("weight_dtype", FLOAT8_DTYPES, ids=name_of)
def test_every_code_of_every_format(
    weight_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    """The unit matrix reads the codes back: each dtype of activations holds all of them."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(weight_dtype)
    finite = codes.float().isfinite()
    data = codes.view(torch.uint8)[finite].view(weight_dtype)[:, None].expand(-1, 16)
    data = (
        data.view(torch.uint8)
        * torch.eye(16, dtype=torch.uint8, device=device).repeat(16, 1)[: data.shape[0]]
    )
    data = data.view(weight_dtype)
    scale = torch.ones(data.shape[0], 1, device=device)

    out = run(torch.eye(16, device=device).to(dtype), data, scale, RECIPES["row"])

    assert torch.equal(out.float(), data.float().t())


@pytest.mark.parametrize("layout", ["every second row", "expanded"])
def test_strided_activations_and_a_transposed_weight(layout: str, device: str) -> None:
    recipe = RECIPES["block-48x80"]
    data, scale = oracle.make_weight(60, 100, recipe, device=device)
    data = data.t().contiguous().t()
    whole = torch.randn(20, 120, device=device).bfloat16()
    x = whole[::2, 7:107] if layout == "every second row" else whole[:1, :100].expand(5, 100)

    out = run(x, data, scale, recipe, out_dtype=torch.float32)

    wide = oracle.dequantized_weight(data, scale, recipe)
    oracle.assert_matches(out, oracle.truth(x.double(), wide))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets the NaN
def test_a_non_finite_row_stays_in_its_row(device: str) -> None:
    recipe = RECIPES["block-128x128"]
    data, scale = oracle.make_weight(40, 50, recipe, device=device)
    x = torch.randn(5, 50, device=device).bfloat16()
    clean = run(x, data, scale, recipe)
    x[2, 3] = torch.nan

    out = run(x, data, scale, recipe)

    assert out[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("m", [1, 32, 64, 4096])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared", [101_376, 232_448])
def test_stages_fit_beside_wide_activations(m: int, itemsize: int, shared: int) -> None:
    limits = DeviceLimits(capability=(8, 9), multiprocessors=128, shared_memory=shared)
    plain = choose_config(
        m, 4096, block_size=(128, 128), upcast=True, descriptors=False, limits=limits
    )

    config = fit_wide(plain, itemsize, limits)

    assert 1 <= config.num_stages <= plain.num_stages
    tile: GemmConfig = config
    used = tile.num_stages * (itemsize * tile.block_m + tile.block_n) * tile.block_k
    assert used + itemsize * tile.block_n * tile.block_k <= shared
