"""The choice of a Hopper kernel: pure, within the device's limits, and the measured one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch.kernels.hopper_config import (
    SHARED_MEMORY,
    HopperConfig,
    choose_config,
    decode_config,
    gemm_config,
)
from fp8dispatch.kernels.launch import ceil_div, next_power_of_2

H200 = 132


def shared_memory(config: HopperConfig, k: int) -> int:
    """What the kernels allocate, without barriers."""
    operands = config.stages * (config.block_m + config.block_n) * 128
    if config.kind == "decode":
        return operands + next_power_of_2(share_of(config, k)) * config.block_m * 4
    return operands + config.stages * 512 + 4 * 64 * 128  # scales, two pieces for each consumer


def share_of(config: HopperConfig, k: int) -> int:
    """Blocks of K that a decode program walks: whole boxes."""
    blocks = ceil_div(ceil_div(k, 128), config.split)
    return ceil_div(blocks, config.chunk) * config.chunk


@given(
    m=st.integers(1, 100_000),
    n=st.integers(1, 200_000),
    k=st.integers(1, 8_000).map(lambda blocks: blocks * 16),
    masked=st.booleans(),
    multiprocessors=st.sampled_from([16, 60, 78, 114, 132]),
)
def test_every_choice_fits_the_device_and_covers_k(
    m: int, n: int, k: int, masked: bool, multiprocessors: int
) -> None:
    config = choose_config(m, n, k, masked, multiprocessors)

    assert shared_memory(config, k) + 1024 <= SHARED_MEMORY
    assert config.stages % config.chunk == 0
    assert config.tiles(m, n) * config.block_m * config.block_n >= m * n
    assert (config.kind == "decode") == (m <= 64)
    assert not (masked and config.kind == "wide")
    if config.kind == "decode":
        assert config.block_m >= m
        assert config.stages <= share_of(config, k)  # every slot of the ring is filled once
        assert share_of(config, k) * config.split >= ceil_div(k, 128)
        # Boxes hold at most 256 rows along each axis, and tensors are powers of two.
        assert {config.block_m, config.block_n, config.chunk} <= {1, 2, 4, 16, 32, 64, 128}
    if config.kind == "split":
        assert config.split * config.tiles(m, n) <= multiprocessors
    elements, counters = config.workspace(m, n)
    assert (elements > 0) == (config.split > 1) == (counters > 0)


def test_the_measured_shapes_take_the_kernels_that_were_measured() -> None:
    for m, n, k in (
        (4096, 4096, 7168),
        (4096, 7168, 2048),
        (4096, 24576, 1536),
        (8192, 8192, 8192),
        (1024, 8192, 8192),
    ):
        assert choose_config(m, n, k, False, H200) == gemm_config("wide", m, k)
    assert choose_config(256, 7168, 16384, False, H200).kind == "square"
    assert choose_config(512, 4096, 7168, False, H200).kind == "square"
    narrow = gemm_config("square", 256, 7168, narrow=True)
    assert choose_config(256, 4096, 7168, False, H200) == narrow
    halves = gemm_config("split", 256, 7168, split=2, narrow=True)
    assert choose_config(256, 1536, 7168, False, H200) == halves


@pytest.mark.parametrize(
    ("n", "k", "m", "expected"),
    [
        # block_m, block_n, split, chunk, stages, warps: the best of the prototype's sweep
        (7168, 2048, 16, (16, 64, 1, 4, 16, 4)),
        (4096, 7168, 1, (16, 64, 1, 4, 20, 4)),
        (24576, 1536, 16, (16, 64, 1, 2, 6, 4)),
        (7168, 16384, 16, (16, 64, 1, 4, 16, 4)),
        (57344, 8192, 16, (16, 64, 1, 2, 4, 4)),
        (57344, 8192, 64, (64, 128, 1, 2, 4, 8)),
        (4096, 7168, 64, (64, 64, 1, 4, 12, 4)),
        (4096, 7168, 32, (32, 64, 1, 4, 16, 4)),
    ],
)
def test_decode_rings_are_those_of_the_sweep(
    n: int, k: int, m: int, expected: tuple[int, ...]
) -> None:
    found = decode_config(m, n, k, H200)
    shape = (found.block_m, found.block_n, found.split, found.chunk, found.stages, found.warps)
    assert shape == expected


def test_few_tiles_share_their_k() -> None:
    config = decode_config(16, 512, 7168, H200)
    assert config.split == 8  # of 56 blocks: eight equal parts, 64 programs
    assert decode_config(16, 512, 128, H200).split == 1  # one block cannot be shared
    assert choose_config(128, 4096, 7168, False, H200).split == 2
    assert choose_config(128, 576, 7168, False, H200).split == 3
    assert choose_config(128, 1280, 8192, False, H200).split == 4
    assert choose_config(128, 4096, 128, False, H200).split == 1


def test_a_choice_changes_with_m_at_few_places() -> None:
    """Each place may compile a kernel anew; within one, all M share it."""
    kernels = {choose_config(m, 4096, 7168, False, H200) for m in range(1, 20_000)}
    assert len(kernels) <= 10
    pairs = itertools.pairwise(choose_config(m, 4096, 7168, False, H200) for m in range(1, 65))
    assert sum(one != other for one, other in pairs) == 2
