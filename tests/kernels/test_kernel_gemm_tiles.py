"""Other tiles of the GEMM fit the device, and change no bit of the result."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from fp8dispatch.kernels.gemm_config import GemmConfig, choose_config
from fp8dispatch.kernels.gemm_tiles import MOST, candidates, tile_of, with_tile
from fp8dispatch.kernels.launch import INTERPRETER_LIMITS, DeviceLimits
from fp8dispatch.kernels.scaled_gemm import gemm_call, scaled_gemm
from fp8dispatch.kernels.tile import Tile

H200 = DeviceLimits(capability=(9, 0), multiprocessors=132, shared_memory=232_448)
L40 = DeviceLimits(capability=(8, 9), multiprocessors=142, shared_memory=101_376)
A100 = DeviceLimits(capability=(8, 0), multiprocessors=108, shared_memory=166_912)
BLOCKS = [None, (128, 128), (64, 128), (1, 32), (48, 80), (256, 256), (7, 16)]
FREE = {"block_m", "block_n", "group_m", "num_warps", "num_stages", "programs_per_sm"}


def chosen(
    m: int, block_size: tuple[int, int] | None, limits: DeviceLimits, *, upcast: bool = False
) -> GemmConfig:
    return choose_config(
        m, 4096, block_size=block_size, upcast=upcast, descriptors=True, limits=limits
    )


@pytest.mark.parametrize("limits", [H200, L40, A100, INTERPRETER_LIMITS], ids=str)
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize("m", [1, 17, 64, 65, 5000])
def test_every_candidate_fits_and_sums_as_the_default_does(
    m: int, block_size: tuple[int, int] | None, upcast: bool, limits: DeviceLimits
) -> None:
    default = chosen(m, block_size, limits, upcast=upcast)

    tiles = candidates(default, block_size, upcast, limits)

    assert 1 <= len(tiles) <= MOST
    assert len({str(tile) for tile in tiles} - {str(tile_of(default))}) == len(tiles)
    for tile in tiles:
        config = with_tile(default, tile, block_size, upcast, limits)
        assert tile_of(config) == tile
        fixed = {name: value for name, value in asdict(config).items() if name not in FREE}
        assert fixed == {name: value for name, value in asdict(default).items() if name in fixed}
        assert "block_k" in fixed
        stage = (config.block_m + config.block_n) * config.block_k
        assert config.num_stages * stage <= limits.shared_memory
        # 64 rows and more go to a warpgroup's instruction, which sums in a way of its own.
        assert (config.block_m >= 64) == (default.block_m >= 64)
        share = config.block_m * config.block_n // (32 * config.num_warps)
        assert share <= 64 * 128 // (32 * default.num_warps), "its registers would spill"
        if block_size is not None and block_size[0] % default.block_n == 0:
            assert block_size[0] % config.block_n == 0, "one weight scale became a vector"


def test_a_tile_of_another_size_leaves_the_default() -> None:
    """Of a bucket's other M, of another format, and of a card with less memory."""
    large = Tile(128, 128, 8, 4, 1)
    few, many = chosen(16, (128, 128), H200), chosen(4096, (128, 128), H200)

    def used(config: GemmConfig, tile: Tile, limits: DeviceLimits = H200, **how: Any) -> Tile:
        return tile_of(with_tile(config, tile, how.get("block"), how.get("upcast", False), limits))

    assert used(many, large) == large
    assert used(few, large) == tile_of(few)
    assert used(many, Tile(32, 64, 4, 4)) == tile_of(many)
    assert used(chosen(4096, None, H200, upcast=True), large, upcast=True) != large
    assert used(many, replace(large, num_stages=4), L40) == tile_of(many)
    assert used(many, replace(large, num_stages=8)) == tile_of(many), "256 KiB of stages"
    assert used(many, Tile(64, 256, 8, 4, 1), block=(128, 128)) == tile_of(many)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_m", 48),
        ("block_n", 512),
        ("num_warps", 3),
        ("num_stages", 0),
        ("num_stages", 9),
        ("programs_per_sm", -1),
        ("group_m", 0),
    ],
)
def test_a_number_that_no_kernel_is_made_for_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} of a tile must be one of .*, found {value}$"):
        replace(Tile(64, 128, 4, 3), **{field: value})


def test_a_tile_is_printed_shortly() -> None:
    assert str(Tile(64, 128, 4, 3)) == "64x128, 4 warps, 3 stages"
    assert str(Tile(64, 128, 4, 3, 2, 8)) == "64x128, 4 warps, 3 stages, 2 per SM, groups of 8"


def exact_codes(rows: int, cols: int) -> torch.Tensor:
    """E4M3 numbers of four binades: a chunk's sum of their products is exact in float32, in any
    order, so that nothing but the order in which chunks are promoted can change a bit."""
    values = (8 + torch.randint(0, 8, (rows, cols))) * 2.0 ** torch.randint(-4, 0, (rows, cols))
    return (values * torch.where(torch.rand(rows, cols) < 0.5, -1, 1)).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("block_size", [None, (128, 128), (1, 32), (48, 80)], ids=str)
@pytest.mark.parametrize("m", [3, 20, 64, 70])
def test_no_candidate_changes_a_bit(m: int, block_size: tuple[int, int] | None) -> None:
    n, k = 72, 272
    a, b = exact_codes(m, k), exact_codes(n, k)
    bias = torch.randn(n)
    if block_size is None:
        a_scale, b_scale = torch.rand(m, 1) + 0.1, torch.rand(n, 1) + 0.1
    else:
        groups = -(-k // block_size[1])
        a_scale, b_scale = torch.rand(m, groups) + 0.1, torch.rand(-(-n // block_size[0]), groups)

    def run(config: GemmConfig | None = None, tile: Tile | None = None) -> torch.Tensor:
        out = torch.full((m, n), torch.nan)
        scaled_gemm(a, a_scale, b, b_scale, bias, out, block_size, config, tile=tile)
        return out

    def config_of(tile: Tile | None) -> GemmConfig:
        out = torch.empty(m, n)
        return gemm_call(a, a_scale, b, b_scale, bias, out, block_size, tile=tile).config

    default, expected = config_of(None), run()
    assert not expected.isnan().any()
    for tile in candidates(default, block_size, True, INTERPRETER_LIMITS):
        assert tile_of(config_of(tile)) == tile
        assert torch.equal(run(tile=tile).view(torch.int32), expected.view(torch.int32)), str(tile)
    if block_size is None:  # a shorter chunk is promoted at other places: the operands tell
        assert not torch.equal(run(replace(default, block_k=32)), expected)
