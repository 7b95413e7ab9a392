"""The grouped Hopper kernel without a GPU: where tiles are, what rows become, whole calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch.kernels import experts_routing
from fp8dispatch.kernels.hopper_experts_config import (
    GROUP_M,
    PITCH,
    TILE_ROWS,
    first_scale,
    scale_columns,
)
from fp8dispatch.kernels.hopper_experts_rows import prepare_rows
from fp8dispatch.kernels.launch import ceil_div
from fp8dispatch.kernels.sorted_rows import SortedRows
from fp8dispatch.moe.routing import clamped_ends
from fp8dispatch.quantization import dynamic
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Recipe
from tests import oracle
from tests.kernels.emulated_hopper_experts import PLACE, Emulated, install, run, tiles_of
from tests.moe.cases import WAYS, make_call

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets planted NaNs

# On a GPU the kernels around the multiplication are compiled, and take tensors of the GPU alone.
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter on a CPU")


@given(start=st.integers(0, 10_000), rows=st.integers(1, 20_000), tiles_n=st.integers(1, 9))
def test_the_tiles_of_an_expert_cover_its_rows_and_columns_once(
    start: int, rows: int, tiles_n: int
) -> None:
    count = ceil_div(rows, TILE_ROWS)
    places = [PLACE(t, start, start + rows, tiles_n, GROUP_M) for t in range(count * tiles_n)]

    wanted = {(start + i * TILE_ROWS, j) for i in range(count) for j in range(tiles_n)}
    assert set(places) == wanted
    assert len(places) == len(wanted)
    for first in range(0, len(places), GROUP_M * tiles_n):
        strip = places[first : first + GROUP_M * tiles_n]
        assert len({row for row, _ in strip}) <= GROUP_M
        assert [col for _, col in strip] == sorted(col for _, col in strip)


def test_what_is_no_tile_is_at_the_start() -> None:
    """The kernel asks for the tile behind its last one, as the first of an expert without rows."""
    assert PLACE(0, 0, 0, 7, GROUP_M) == (0, 0)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_scales_of_experts_are_aligned_and_apart(counts: list[int]) -> None:
    end, start = 0, 0
    for expert, count in enumerate(counts):
        first = first_scale(start, expert)
        assert first % PITCH == 0
        assert first >= end
        start, end = start + count, first + count
    columns = scale_columns(start, len(counts))
    assert end <= columns < start + PITCH * (len(counts) + 1)
    assert columns % PITCH == 0, "rows of scales are aligned too"


def columns_of(ends: torch.Tensor) -> torch.Tensor:
    """Where the scale of each sorted row stands."""
    starts = [0, *ends.tolist()[:-1]]
    columns = [
        first_scale(start, expert) + torch.arange(end - start)
        for expert, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True))
    ]
    return torch.cat(columns).to(ends.device)


def prepared(
    routed: SortedRows,
    x: torch.Tensor,
    n: int = 5,
    static: torch.Tensor | None = None,
    *,
    whole_rows: bool = False,
) -> tuple[torch.Tensor, ...]:
    """data, scale, out, targets, table of a call of `prepare_rows`; memory was poisoned before."""
    rows, k, device = routed.rows, x.shape[1], x.device
    experts = routed.ends.shape[0]
    groups = 1 if whole_rows else ceil_div(k, 128)
    data = torch.empty((rows, k), dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty((groups, scale_columns(rows, experts)), dtype=torch.float32, device=device)
    out = torch.full((rows, n), 7.0, dtype=torch.bfloat16, device=device)
    index = torch.empty((2, experts + 1), dtype=torch.int32, device=device)
    targets = torch.empty(rows, dtype=torch.int32, device=device)
    bound = experts_routing.tile_bound(rows, experts, TILE_ROWS)
    table = torch.empty((1 + bound, 4), dtype=torch.int32, device=device)
    experts_routing.schedule(routed.ends, rows, TILE_ROWS, index[0], index[1])
    prepare_rows(x, static, data, scale, out, index, targets, table, routed, whole_rows=whole_rows)
    return data, scale, out, targets, table


@pytest.mark.parametrize("experts", [1, 3, 60, 300])
@pytest.mark.parametrize("rows", [1, 127, 700])
def test_the_table_names_every_tile_of_every_expert(experts: int, rows: int, device: str) -> None:
    offsets = torch.randint(-50, rows + 50, (experts,), device=device)
    offsets[experts // 3] = rows + 2**33
    routed = SortedRows(offsets, rows)
    *_, table = prepared(routed, torch.randn(rows, 16, device=device))

    ends = clamped_ends(routed).tolist()
    starts = [0, *ends[:-1]]
    table = table.cpu()
    seen = [expert for expert, *_ in tiles_of(table, 1, 0, 1)]
    counts = [ceil_div(end - start, TILE_ROWS) for start, end in zip(starts, ends, strict=True)]
    assert seen == [expert for expert, count in enumerate(counts) for _ in range(count)]
    covered = torch.zeros(rows, dtype=torch.int32)
    for program in range(5):  # between them they take every tile once
        for expert, end, row, _ in tiles_of(table, 1, program, 5):
            assert end == ends[expert]
            assert starts[expert] <= row < end
            covered[row : min(row + TILE_ROWS, end)] += 1
    assert covered[: ends[-1]].eq(1).all()
    assert covered[ends[-1] :].eq(0).all()


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(3, 16), (70, 400), (1030, 144)])
def test_rows_are_gathered_and_quantised_as_anywhere(
    rows: int, k: int, whole_rows: bool, device: str
) -> None:
    x = torch.randn(rows // 2 + 1, 2 * k, device=device).bfloat16()[:, ::2]
    x[0] = 0
    gather = torch.randint(0, x.shape[0], (rows,), device=device)
    ends = torch.tensor([rows // 3, rows], device=device)

    data, scale, _, targets, _ = prepared(SortedRows(ends, rows, gather), x, whole_rows=whole_rows)

    group = k if whole_rows else 128
    wanted, wanted_scale = dynamic.quantize(x[gather], group, data.dtype, use_kernels=True)
    assert torch.equal(data.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scale[:, columns_of(ends)].t(), wanted_scale)
    assert torch.equal(targets.long(), torch.arange(rows, device=device))


@pytest.mark.parametrize("whole_rows", [False, True])
def test_static_scales_are_those_of_the_row_s_expert(whole_rows: bool, device: str) -> None:
    rows, k, experts = 90, 272, 4
    x = torch.randn(rows, k, device=device) * 300
    static = torch.tensor([0.5, 9.0, 0.25, 9.0, 2.0, 9.0, 1.0, 9.0], device=device)[::2]
    ends = torch.tensor([20, 20, 60, 90], device=device)

    data, scale, *_ = prepared(SortedRows(ends, rows), x, static=static, whole_rows=whole_rows)

    owner = torch.searchsorted(ends, torch.arange(rows, device=device), right=True)
    assert torch.equal(scale[:, columns_of(ends)], static[owner].expand(scale.shape[0], rows))
    for expert in range(experts):
        own = owner == expert
        wanted, _ = dynamic.quantize(x[own], k, data.dtype, static[expert : expert + 1])
        # What is tested is which scale a row takes: rounding is the quantiser's.
        assert torch.allclose(data[own].float(), wanted.float(), rtol=0.07, atol=2**-8)


def test_rows_nobody_multiplies_are_zeros_where_they_belong(device: str) -> None:
    """Behind the last end, gathered from nowhere, sent nowhere."""
    rows, n = 300, 300
    gather = torch.arange(rows, device=device)
    gather[5], gather[6] = -1, rows
    scatter = torch.arange(rows, device=device).flip(0)
    scatter[8], scatter[9], scatter[rows - 1] = -1, rows, 2**35
    ends = torch.tensor([4, 270], device=device)

    _, _, out, targets, _ = prepared(
        SortedRows(ends, rows, gather, scatter), torch.randn(rows, 144, device=device), n
    )

    dead = [5, 6, *range(270, rows)]
    wanted = scatter.clone()
    wanted[[*dead, 8, 9]] = -1
    assert torch.equal(targets.long(), wanted)
    cleared = {int(scatter[row]) for row in dead if int(scatter[row]) < rows}
    for place in range(rows):
        assert bool(out[place].eq(0.0 if place in cleared else 7.0).all()), place


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[Emulated]:
    return install(monkeypatch)


@needs_cpu
@pytest.mark.parametrize("recipe", [TENSOR, ROW, BLOCK_128], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("emulated")
def test_every_recipe_and_way(way: str, recipe: Recipe) -> None:
    for n, k, rows, dtype in ((272, 400, 150, torch.bfloat16), (3, 16, 9, torch.float32)):
        call = make_call(way, recipe, 5, n, k, rows, bias=torch.float32)
        oracle.assert_matches(run(call, dtype), call.truth(), min_sqnr=20 if n < 128 else None)


@needs_cpu
@pytest.mark.usefixtures("emulated")
def test_a_program_takes_many_tiles_and_both_consumers_meet_ends() -> None:
    """Three programs and five columns of tiles; experts end in either half, or fill their tiles."""
    call = make_call("grouped", BLOCK_128, 6, 1100, 784, 500, sentinels=0.0)
    ends = torch.tensor([40, 110, 238, 302, 302, 500], dtype=torch.int32)
    call.arguments["offsets"] = ends
    call.owners = torch.searchsorted(ends, torch.arange(500), right=True).tolist()
    oracle.assert_matches(run(call), call.truth())


@needs_cpu
@pytest.mark.parametrize("experts", [1, 3, 8, 60, 128, 256])
@pytest.mark.parametrize("sentinels", [0.0, 0.9])
@pytest.mark.usefixtures("emulated")
def test_any_number_of_experts(experts: int, sentinels: float) -> None:
    for way in ("batched", "grouped"):
        call = make_call(way, BLOCK_128, experts, 136, 144, 40, sentinels=sentinels)
        oracle.assert_matches(run(call), call.truth())


@needs_cpu
@pytest.mark.usefixtures("emulated")
def test_all_rows_on_one_expert_and_none() -> None:
    for sentinels in (0.0, 1.1):
        call = make_call(
            "grouped", BLOCK_128, 4, 136, 144, 140, sentinels=sentinels, concentrated=True
        )
        oracle.assert_matches(run(call), call.truth())


@needs_cpu
@pytest.mark.parametrize("static", ["one", "each"])
@pytest.mark.parametrize("recipe", [ROW, BLOCK_128], ids=str)
@pytest.mark.usefixtures("emulated")
def test_static_activation_scales(static: str, recipe: Recipe) -> None:
    call = make_call("grouped-index", recipe, 4, 136, 272, 70, static=static)
    oracle.assert_matches(run(call), call.truth(), min_sqnr=45)


@needs_cpu
@pytest.mark.parametrize(
    ("n", "dtype", "elements"),
    [
        (256, torch.bfloat16, 8),
        (260, torch.bfloat16, 4),
        (258, torch.float16, 2),
        (257, torch.bfloat16, 1),
        (260, torch.float32, 4),
        (130, torch.float32, 2),
        (1, torch.float32, 1),
    ],
)
def test_a_store_is_as_wide_as_rows_of_the_output_allow(
    n: int, dtype: torch.dtype, elements: int, emulated: list[Emulated]
) -> None:
    call = make_call("grouped", BLOCK_128, 2, n, 16, 6)
    oracle.assert_matches(run(call, dtype), call.truth(), min_sqnr=-1e9)
    assert emulated[-1].constants["VECTOR"] == elements


@needs_cpu
@pytest.mark.usefixtures("emulated")
def test_experts_that_lie_apart() -> None:
    """The halves of a fused projection: rows of other weights between those of two experts."""
    call = make_call("grouped", BLOCK_128, 3, 256, 144, 40)
    weight, scale = call.arguments["weight"], call.arguments["weight_scale"]
    call.arguments["weight"] = weight[:, 128:]
    call.arguments["weight_scale"] = scale[:, 1:]
    assert not call.arguments["weight"].is_contiguous()
    oracle.assert_matches(run(call), call.truth())


@needs_cpu
@pytest.mark.usefixtures("emulated")
def test_an_expert_s_row_that_is_not_a_number_stays_alone() -> None:
    """Rows behind an expert's end are multiplied with it, and must not be seen."""
    call = make_call("grouped", BLOCK_128, 3, 136, 144, 60, sentinels=0.0)
    call.arguments["x"][20] = float("nan")

    out = run(call)

    assert out[20].isnan().all()
    kept = torch.arange(60) != 20
    assert out[kept].isfinite().all()


@needs_cpu
@pytest.mark.usefixtures("emulated")
def test_an_input_without_rows() -> None:
    call = make_call("batched-gather", BLOCK_128, 3, 16, 144, 6)
    call.arguments["x"] = call.arguments["x"][:0]
    assert bool((run(call) == 0).all())
