"""The tile choice is a pure function that fits every device it may meet."""

from __future__ import annotations

import pytest

from fp8dispatch.kernels.gemm_config import choose_config, chunk_of
from fp8dispatch.kernels.launch import INTERPRETER_LIMITS, DeviceLimits, ceil_div

H200 = DeviceLimits(capability=(9, 0), multiprocessors=132, shared_memory=232_448)
L40 = DeviceLimits(capability=(8, 9), multiprocessors=142, shared_memory=101_376)
A100 = DeviceLimits(capability=(8, 0), multiprocessors=108, shared_memory=166_912)
BLOCKS = [None, (128, 128), (64, 128), (1, 32), (48, 80), (256, 256), (7, 16)]


@pytest.mark.parametrize("limits", [H200, L40, A100, INTERPRETER_LIMITS], ids=str)
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize("m", [1, 17, 64, 65, 5000])
def test_every_choice_fits(
    m: int, block_size: tuple[int, int] | None, upcast: bool, limits: DeviceLimits
) -> None:
    config = choose_config(
        m, 4096, block_size=block_size, upcast=upcast, descriptors=True, limits=limits
    )

    bytes_per_element = 1
    stage = (config.block_m + config.block_n) * config.block_k * bytes_per_element
    assert config.num_stages * stage <= limits.shared_memory
    assert config.num_stages >= 2
    assert 16 <= config.block_k <= 128
    assert upcast or config.block_k >= 32
    assert not config.descriptors or block_size is None or block_size[1] % config.block_k == 0


def test_the_measured_choice_for_the_h200() -> None:
    config = choose_config(
        4096, 7168, block_size=(128, 128), upcast=False, descriptors=True, limits=H200
    )

    assert (config.block_m, config.block_n, config.block_k) == (64, 128, 128)
    assert (config.num_warps, config.num_stages, config.programs_per_sm) == (4, 4, 2)
    assert config.descriptors


def test_m_changes_the_tile_only_between_classes() -> None:
    def choose(m: int) -> object:
        return choose_config(
            m, 57_344, block_size=(128, 128), upcast=False, descriptors=True, limits=H200
        )

    assert choose(1) == choose(16)
    assert choose(17) == choose(32)
    assert choose(33) == choose(64)
    assert choose(65) == choose(100_000)


@pytest.mark.parametrize("m", [1, 16, 64, 256])
def test_few_rows_still_give_most_multiprocessors_a_tile(m: int) -> None:
    config = choose_config(
        m, 4096, block_size=(128, 128), upcast=False, descriptors=True, limits=H200
    )

    tiles = ceil_div(m, config.block_m) * ceil_div(4096, config.block_n)
    assert tiles >= 64


@pytest.mark.parametrize(
    ("block_k", "upcast", "chunk"),
    [
        (None, False, 128),
        (128, False, 128),
        (256, False, 128),
        (64, False, 64),
        (32, False, 32),
        (16, False, 32),
        (16, True, 16),
        (48, False, 64),
        (48, True, 16),
        (80, False, 32),
        (100, False, 128),
    ],
)
def test_chunks_cover_a_block_with_the_fewest_zeros(
    block_k: int | None, upcast: bool, chunk: int
) -> None:
    assert chunk_of(block_k, 128, upcast) == chunk


def test_the_tile_narrows_to_one_weight_scale() -> None:
    config = choose_config(
        4096, 4096, block_size=(64, 128), upcast=False, descriptors=True, limits=H200
    )

    assert config.block_n == 64
