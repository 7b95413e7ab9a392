"""The kernels around an expert matmul: sorting ids, counting tiles, and sums in a fixed order."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch.kernels import experts_backward, experts_gemm, experts_routing
from fp8dispatch.kernels.gemm_config import GemmConfig, choose_config
from fp8dispatch.kernels.launch import DeviceLimits
from fp8dispatch.kernels.sorted_rows import NamedRows, SortedRows
from fp8dispatch.moe.routing import clamped_ends, sort_ids

H200 = DeviceLimits(capability=(9, 0), multiprocessors=132, shared_memory=232_448)


@pytest.mark.parametrize("experts", [1, 7, 256, 300])
@pytest.mark.parametrize("rows", [1, 31, 33, 270])
def test_counting_sorts_as_torch_does(experts: int, rows: int, device: str) -> None:
    ids = torch.randint(-3, experts + 3, (rows,), device=device)

    order, ends = sort_ids(ids, experts, use_kernels=True)
    wanted_order, wanted_ends = sort_ids(ids, experts, use_kernels=False)

    assert torch.equal(order, wanted_order)
    assert torch.equal(ends, wanted_ends)


def test_ids_far_outside_of_32_bits_are_of_no_expert(device: str) -> None:
    ids = torch.tensor([2**40, -(2**40), 2**32 + 1, 1, 2**63 - 1], device=device)

    order, ends = sort_ids(ids, 3, use_kernels=True)

    assert order.tolist() == [3, 0, 1, 2, 4]
    assert ends.tolist() == [0, 1, 1]


@pytest.mark.parametrize("experts", [1, 5, 1023, 1024, 2500])
def test_the_schedule_clamps_ends_and_counts_tiles(experts: int, device: str) -> None:
    rows, block_m = 97, 16
    offsets = torch.randint(-20, 130, (2 * experts,), device=device)[::2]
    offsets[experts // 2 :] += 2**35
    offsets[0] = -(2**32) + 7  # 7, were it cut to 32 bits before it is clamped
    bounds = torch.empty((2, experts + 1), dtype=torch.int32, device=device)

    experts_routing.schedule(offsets, rows, block_m, bounds[0], bounds[1])

    ends = clamped_ends(SortedRows(offsets, rows))
    assert torch.equal(bounds[0, :-1].long(), ends)
    assert int(bounds[0, -1]) == rows
    counts = torch.diff(bounds[0].long(), prepend=bounds.new_zeros(1).long())
    tiles = (counts + block_m - 1) // block_m
    assert torch.equal(bounds[1].long(), tiles.cumsum(0))
    assert int(bounds[1, -1]) <= experts_routing.tile_bound(rows, experts, block_m)


@pytest.mark.parametrize("experts", [1, 2, 9])
def test_the_bound_on_tiles_is_reached_and_never_passed(experts: int) -> None:
    """Every group one row into a new tile is the worst that can happen."""
    block_m = 4
    for rows in range(30):
        most = 0
        for spread in range(experts + 2):  # so many groups hold one row, the last one the rest
            counts = [1] * min(spread, rows)
            rest = rows - len(counts)
            if len(counts) <= experts:
                most = max(most, len(counts) + -(-rest // block_m))
        assert most <= experts_routing.tile_bound(rows, experts, block_m) <= max(rows, 0)


@pytest.mark.parametrize("programs_per_sm", [0, 1])
@pytest.mark.parametrize("descriptors", [False, True])
def test_persistent_programs_and_descriptors_give_the_same_bits(
    programs_per_sm: int, descriptors: bool, device: str
) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"needs TMA (capability 9.0), got {torch.cuda.get_device_capability()}")
    rows, experts, n, k = 50, 3, 40, 64
    a = torch.randn(rows, k, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(experts, n, k, device=device).to(torch.float8_e4m3fn)
    a_scale = torch.rand(rows, 2, device=device) + 0.1
    b_scale = torch.rand(experts, 2, 2, device=device) + 0.1
    ends = torch.tensor([21, 21, 44], device=device)
    config = GemmConfig(
        block_m=16, block_n=32, block_k=32, group_m=2, num_warps=4, num_stages=2,
        programs_per_sm=0, descriptors=False,
    )  # fmt: skip

    outs = []
    for one in (
        config,
        GemmConfig(16, 32, 32, 2, 4, 2, programs_per_sm=programs_per_sm, descriptors=descriptors),
    ):
        out = torch.full((rows, n), torch.nan, device=device)
        experts_gemm.experts_gemm(
            a, a_scale, b, b_scale, None, out, (32, 32), SortedRows(ends, rows), one
        )
        outs.append(out)

    assert torch.equal(*outs)
    assert not outs[0][44:].any()
    assert outs[0][:44].any(1).all()


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_rows_that_name_their_expert_give_the_bits_of_sorted_ones(rows: int, device: str) -> None:
    """Also where one expert has more rows than a tile."""
    experts, n, k = 3, 24, 32
    a = torch.randn(rows, k, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(experts, n, k, device=device).to(torch.float8_e4m3fn)
    a_scale = torch.rand(rows, 1, device=device) + 0.1
    b_scale = torch.rand(experts, n, 1, device=device) + 0.1
    ids = torch.randint(-2, experts + 2, (rows,), device=device)
    ids[rows // 4 :: 2] = 1
    gather = torch.randint(-1, rows, (rows,), device=device)
    order, ends = sort_ids(ids, experts, use_kernels=False)
    config = GemmConfig(16, 32, 32, 2, 4, 2, programs_per_sm=0, descriptors=False)

    outs = []
    for routed in (
        NamedRows(ids, rows, gather),
        SortedRows(ends, rows, gather[order], order),
    ):
        out = torch.full((rows, n), torch.nan, device=device)
        experts_gemm.experts_gemm(a, a_scale, b, b_scale, None, out, None, routed, config)
        outs.append(out)

    assert torch.equal(*outs)
    reached = (ids >= 0) & (ids < experts) & (gather >= 0)
    assert torch.equal(outs[0].any(1), reached)


def test_sums_of_rows_take_them_in_order(device: str) -> None:
    values = torch.randn(9, 40, device=device)
    order = torch.tensor([4, 0, 2, 8, 1], dtype=torch.int32, device=device)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32, device=device)
    out = torch.full((3, 40), torch.nan, device=device)

    experts_backward.sum_rows(values, order, ends, out)

    assert torch.equal(out[0], values[4] + values[0])
    assert torch.equal(out[1], torch.zeros(40, device=device))
    assert torch.equal(out[2], values[2] + values[8] + values[1])


def test_the_tile_depends_on_the_class_of_an_experts_share_alone() -> None:
    def tile(rows: int, experts: int) -> GemmConfig:
        return choose_config(
            rows, 4096, block_size=(128, 128), upcast=False, descriptors=False, limits=H200,
            experts=experts,
        )  # fmt: skip

    assert tile(64, 128) == tile(1024, 128) == tile(2048, 128)  # up to 16 rows for each
    assert {tile(rows, 128).block_m for rows in (1, 2048, 2049, 4096, 4097, 10**6)} == {16, 32, 64}
    assert tile(8192, 8) == tile(65536, 8)
