"""The grouped Gluon kernel on a Hopper GPU. Its first call is made in a child that is watched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8dispatch import fp8_experts_grouped
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.moe.backends.gluon import BACKEND
from fp8dispatch.moe.execute import decoded_weights
from fp8dispatch.moe.routing import sort_by_expert
from fp8dispatch.probes.device import describe
from fp8dispatch.probes.numerics import run_canary
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Recipe
from tests import oracle
from tests.moe.cases import RECIPES, WAYS, make_call

pytestmark = pytest.mark.gpu

TAKEN = {name: RECIPES[name] for name in ("tensor", "row", "128x128")}
ROOT = Path(__file__).parents[2]
SECONDS = 240  # for a first compilation and a tiny call

# One tile; a tile of each consumer; a program's second tile, rows of two experts in a box.
FIRST_CALLS = """
import torch
from fp8dispatch.recipe import BLOCK_128
from tests import oracle
from tests.kernels.emulated_hopper_experts import run
from tests.moe.cases import make_call
for experts, n, k, rows in ((1, 16, 128, 3), (1, 256, 256, 128), (3, 272, 640, 500)):
    call = make_call("grouped", BLOCK_128, experts, n, k, rows, sentinels=0.0, device="cuda")
    call.arguments["bias"] = None
    out = run(call)
    torch.cuda.synchronize()
    oracle.assert_matches(out, call.truth(), min_sqnr=40)
    print("right", n, k, flush=True)
"""


def compute(call: Any, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    # Imported here: the module imports Gluon, which not every machine of this suite has.
    from tests.kernels.emulated_hopper_experts import run

    return run(call, dtype)


@pytest.fixture(scope="module", autouse=True)
def hopper() -> None:
    """Skip where the backend does not run; a kernel that hangs is found once, in a child."""
    reasons = BACKEND.refuse_machine(describe(torch.device("cuda", 0))) or BACKEND.loadable(
        BLOCK_128
    )
    if reasons:
        pytest.skip("; ".join(f"gluon {reason}" for reason in reasons))
    try:
        child = subprocess.run(
            [sys.executable, "-c", FIRST_CALLS],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired as hang:
        pytest.fail(f"hangs, after {hang.stdout!r}")
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.parametrize("recipe", TAKEN.values(), ids=TAKEN)
def test_the_canary_is_right(recipe: Recipe) -> None:
    result = run_canary(BACKEND, torch.device("cuda", 0), recipe)

    assert result.right, result.reason


@pytest.mark.parametrize("recipe", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("way", WAYS)
def test_every_recipe_and_way_on_ragged_sizes(way: str, recipe: Recipe) -> None:
    """Short and long K, tails of M, N and K, every width of a store, every output dtype."""
    for experts, n, k, rows, dtype, bias in (
        (9, 264, 128, 7, torch.bfloat16, None),
        (5, 256, 144, 150, torch.float16, torch.float32),
        (3, 260, 400, 300, torch.bfloat16, torch.bfloat16),
        (4, 130, 1040, 200, torch.float32, torch.float16),
        (2, 999, 640, 140, torch.bfloat16, torch.bfloat16),
        (2, 1, 256, 140, torch.float32, torch.float32),
        (3, 4098, 2304, 500, torch.bfloat16, None),
    ):
        call = make_call(way, recipe, experts, n, k, rows, bias=bias, device="cuda")
        out = compute(call, dtype)
        assert out.dtype == dtype
        # A row of one column is one value, which may cancel: its own bound judges.
        floor = float("-inf") if n == 1 else 40.0 if n < 128 else None
        oracle.assert_matches(out, call.truth(), label=f"{experts} {n} {k} {rows}", min_sqnr=floor)


@pytest.mark.parametrize("experts", [1, 3, 8, 60, 128, 256])
@pytest.mark.parametrize("sentinels", [0.0, 0.2, 0.9])
def test_any_number_of_experts(experts: int, sentinels: float) -> None:
    for way in WAYS:
        for rows in (90, 1200):
            call = make_call(
                way, BLOCK_128, experts, 200, 384, rows, sentinels=sentinels, device="cuda"
            )
            oracle.assert_matches(compute(call), call.truth())


@pytest.mark.parametrize("sentinels", [0.0, 1.1])
def test_all_rows_on_one_expert_and_none(sentinels: float) -> None:
    """More tile rows than are walked together, and more tiles than programs; no tile at all."""
    call = make_call(
        "grouped", BLOCK_128, 4, 2056, 272, 3000, sentinels=sentinels, concentrated=True,
        device="cuda",
    )  # fmt: skip
    oracle.assert_matches(compute(call), call.truth())


@pytest.mark.parametrize("static", ["one", "each"])
@pytest.mark.parametrize("recipe", TAKEN.values(), ids=TAKEN)
def test_static_activation_scales(static: str, recipe: Recipe) -> None:
    call = make_call("grouped-index", recipe, 6, 200, 384, 290, static=static, device="cuda")
    oracle.assert_matches(compute(call), call.truth(), min_sqnr=45)


def test_experts_that_lie_apart() -> None:
    call = make_call("grouped", BLOCK_128, 3, 512, 640, 400, device="cuda")
    call.arguments["weight"] = call.arguments["weight"][:, 256:]
    call.arguments["weight_scale"] = call.arguments["weight_scale"][:, 2:]
    oracle.assert_matches(compute(call), call.truth())


def test_a_row_that_is_not_a_number_stays_alone() -> None:
    call = make_call("grouped", BLOCK_128, 7, 272, 640, 700, sentinels=0.0, device="cuda")
    call.arguments["x"][333] = float("nan")

    out = compute(call)

    assert out[333].isnan().all()
    kept = torch.arange(700, device="cuda") != 333
    assert out[kept].isfinite().all()


def test_nothing_outside_of_the_output_is_written() -> None:
    from fp8dispatch.kernels.hopper_experts_launch import experts_matmul
    from fp8dispatch.kernels.sorted_rows import SortedRows

    call = make_call("grouped", BLOCK_128, 5, 264, 384, 400, device="cuda")
    rows, n, margin = 400, 264, 64
    memory = torch.full((rows + 2 * margin, n), 3.0, dtype=torch.bfloat16, device="cuda")
    out = memory[margin : margin + rows]
    scatter = torch.randperm(rows, device="cuda")
    scatter[7], scatter[70] = -1, rows
    named = call.arguments
    untouched = torch.ones(rows, dtype=torch.bool, device="cuda")
    untouched[scatter[(scatter >= 0) & (scatter < rows)]] = False

    experts_matmul(
        named["x"], None, named["weight"], named["weight_scale"], None, out,
        SortedRows(named["offsets"], rows, None, scatter),
    )  # fmt: skip

    assert bool((memory[:margin] == 3).all())
    assert bool((memory[margin + rows :] == 3).all())
    assert bool((out[untouched] == 3).all())
    assert int(untouched.sum()) == 2


@pytest.mark.parametrize("recipe", TAKEN.values(), ids=TAKEN)
def test_repeats_bit_for_bit(recipe: Recipe) -> None:
    call = make_call(
        "grouped-index", recipe, 20, 1160, 2304, 2500, bias=torch.float32, device="cuda"
    )
    first = compute(call)
    for _ in range(50):
        assert torch.equal(compute(call), first)


def test_a_row_gets_the_same_bits_wherever_it_stands() -> None:
    """In another tile, in the other consumer's half, beside other rows."""
    call = make_call("batched", BLOCK_128, 3, 400, 1040, 500, sentinels=0.0, device="cuda")
    out = compute(call)
    order = torch.randperm(500, device="cuda")
    call.arguments["x"] = call.arguments["x"][order]
    call.arguments["expert_ids"] = call.arguments["expert_ids"][order]
    assert torch.equal(compute(call), out[order])


@pytest.mark.parametrize("way", ["batched", "grouped"])
def test_a_captured_call_follows_new_routing(way: str) -> None:
    call = make_call(way, BLOCK_128, 8, 264, 512, 600, device="cuda")
    name = "expert_ids" if way == "batched" else "offsets"
    held = call.arguments[name].clone()
    call.arguments[name] = held
    compute(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute(call)
    for _ in range(10):
        if way == "batched":
            held.copy_(torch.randint(-1, 9, held.shape, device="cuda"))
        else:
            held.copy_(torch.randint(0, 601, held.shape, device="cuda").sort().values)
        graph.replay()
        assert torch.equal(out, compute(call))


def test_another_number_of_rows_compiles_nothing() -> None:
    from fp8dispatch.kernels.hopper_experts import hopper_experts

    def count() -> int:
        return sum(len(kept[0]) for kept in hopper_experts.device_caches.values())

    calls = [
        make_call("grouped", BLOCK_128, 8, 264, 512, rows, device="cuda")
        for rows in (1, 64, 129, 4001)
    ]
    compute(calls[0])
    compiled = count()
    for call in calls:
        compute(call)
    assert count() == compiled


def test_a_first_call_is_refused_while_a_graph_is_captured() -> None:
    call = make_call("grouped", BLOCK_128, 2, 328, 512, 40, device="cuda")  # of no other test
    warm = make_call("grouped", BLOCK_128, 2, 336, 512, 40, device="cuda")
    compute(warm)
    named = call.arguments  # its scales are read once, which a graph cannot wait for
    decoded_weights(named["weight"], named["weight_scale"], BLOCK_128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute(warm)
        with pytest.raises(BackendUnavailableError, match="run the call once outside the graph"):
            compute(call)
    oracle.assert_matches(compute(call), call.truth())


def test_weights_beyond_2_to_the_31() -> None:
    """256 x 4096 x 2304 elements; the last experts lie behind 2^31."""
    experts, n, k, rows = 256, 4096, 2304, 300
    weight = torch.randint(0, 100, (experts, n, k), dtype=torch.uint8, device="cuda")
    weight = weight.view(torch.float8_e4m3fn)
    scale = torch.rand(experts, n // 128, k // 128, device="cuda") * 0.01 + 0.001
    ids = torch.full((rows,), 255, device="cuda")
    ids[:5] = torch.tensor([0, 254, 128, 253, 255])
    order = sort_by_expert(ids, experts)
    x = torch.randn(rows, k, device="cuda").bfloat16()

    out = fp8_experts_grouped(
        x, weight, scale, order.ends, gather=order.gather, scatter=order.scatter, backend="gluon"
    )

    for row in (0, 1, 2, 3, 4, 150, 299):
        one = int(ids[row])
        expected = oracle.linear_truth(x[row : row + 1], weight[one], scale[one], BLOCK_128)
        oracle.assert_matches(out[row : row + 1], expected)


@pytest.mark.parametrize("recipe", [ROW, TENSOR], ids=str)
def test_rows_times_columns_beyond_2_to_the_31(recipe: Recipe) -> None:
    """2^20 + 5 rows of 2176 columns out: the last rows lie behind 2^31."""
    rows, n, k, experts = 2**20 + 5, 2176, 128, 4
    made = [oracle.make_weight(n, k, recipe, device="cuda") for _ in range(experts)]
    weight, scale = (torch.stack(parts) for parts in zip(*made, strict=True))
    x = torch.randn(rows, k, device="cuda").bfloat16()
    ids = torch.randint(0, experts, (rows,), device="cuda")
    order = sort_by_expert(ids, experts)

    out = fp8_experts_grouped(
        x, weight, scale, order.ends, gather=order.gather, scatter=order.scatter, backend="gluon"
    )

    for row in (0, 1, 2**19, rows - 2, rows - 1):
        one = int(ids[row])
        expected = oracle.linear_truth(x[row : row + 1], weight[one], scale[one], recipe)
        oracle.assert_matches(out[row : row + 1], expected, min_sqnr=45)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("way", WAYS)
def test_tensors_on_a_device_that_is_not_current(way: str) -> None:
    assert torch.cuda.current_device() == 0
    call = make_call(way, BLOCK_128, 6, 200, 384, 290, bias=torch.float32, device="cuda:1")
    oracle.assert_matches(compute(call), call.truth(), min_sqnr=45)
    assert torch.cuda.current_device() == 0
