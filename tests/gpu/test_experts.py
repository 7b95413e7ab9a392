"""Expert matmuls on the GPU: the oracle on real tiles, graphs, gradients, sizes beyond 2^31."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch import fp8_experts_batched, fp8_experts_grouped, registry
from fp8dispatch.moe.routing import sort_by_expert
from fp8dispatch.probes.numerics import run_canary
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle
from tests.moe.cases import RECIPES, WAYS, make_call
from tests.moe.test_matmul_gradients import assert_gradients, backward

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["eager", "triton"])
@pytest.mark.parametrize(
    "recipe", [TENSOR, ROW, BLOCK_128, Recipe(Granularity.BLOCK, (1, 32))], ids=str
)
def test_the_canary_is_right(name: str, recipe: Recipe) -> None:
    result = run_canary(registry.load_experts(name), CUDA, recipe)

    assert result.right, result.reason


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_recipe_and_way(way: str, recipe: Recipe) -> None:
    for rows, experts in ((7, 9), (150, 5), (300, 3)):
        call = make_call(way, recipe, experts, 272, 400, rows, bias=torch.float32, device="cuda")
        oracle.assert_matches(call.run(backend="triton"), call.truth(), min_sqnr=45)


@pytest.mark.parametrize("experts", [1, 3, 8, 60, 128, 256])
@pytest.mark.parametrize("sentinels", [0.0, 0.2, 0.9])
def test_any_number_of_experts(experts: int, sentinels: float) -> None:
    for way in ("batched", "grouped"):
        call = make_call(way, BLOCK_128, experts, 200, 384, 90, sentinels=sentinels, device="cuda")
        oracle.assert_matches(call.run(backend="triton"), call.truth())


@pytest.mark.parametrize("static", ["one", "each"])
def test_static_activation_scales(static: str) -> None:
    call = make_call("grouped-index", BLOCK_128, 6, 200, 384, 90, static=static, device="cuda")

    oracle.assert_matches(call.run(backend="triton"), call.truth(), min_sqnr=45)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_gradients(way: str, dtype: torch.dtype) -> None:
    call = make_call(
        way, BLOCK_128, 6, 200, 384, 90, bias=torch.float32, x_dtype=dtype, device="cuda"
    )
    grad = torch.randn(90, 200, device="cuda").to(dtype)

    got, bias = backward(call, grad)
    again, again_bias = backward(call, grad)

    assert_gradients(call, got, bias, grad)
    assert torch.equal(got, again)
    assert torch.equal(bias, again_bias)


@pytest.mark.parametrize("way", ["batched", "grouped"])
def test_a_captured_call_follows_new_routing(way: str) -> None:
    first = make_call(way, BLOCK_128, 8, 256, 512, 64, device="cuda")
    name = "expert_ids" if way == "batched" else "offsets"
    held = first.arguments[name].clone()
    first.arguments[name] = held
    first.run(backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = first.run(backend="triton")
    for _ in range(3):
        if way == "batched":
            held.copy_(torch.randint(-1, 9, held.shape, device="cuda"))
        else:
            held.copy_(torch.randint(0, 65, held.shape, device="cuda").sort().values)
        graph.replay()
        assert torch.equal(out, first.run(backend="triton"))


def test_another_number_of_rows_of_the_same_class_compiles_nothing() -> None:
    from fp8dispatch.kernels.experts_gemm import _experts_gemm_kernel

    def count() -> int:
        return sum(len(kept[0]) for kept in _experts_gemm_kernel.device_caches.values())

    calls = [
        make_call("batched", BLOCK_128, 32, 256, 512, rows, device="cuda") for rows in (17, 64)
    ]
    calls[0].run(backend="triton")
    compiled = count()
    for call in calls:
        call.run(backend="triton")

    assert count() == compiled


def test_weights_beyond_2_to_the_31() -> None:
    """256 x 4096 x 2304 elements; the last experts lie behind 2^31."""
    experts, n, k = 256, 4096, 2304
    weight = torch.randint(0, 100, (experts, n, k), dtype=torch.uint8, device="cuda")
    weight = weight.view(torch.float8_e4m3fn)
    scale = torch.rand(experts, n // 128, k // 128, device="cuda") * 0.01 + 0.001
    ids = torch.tensor([255, 0, 254, 255, 128], device="cuda")
    x = torch.randn(5, k, device="cuda").bfloat16()

    out = fp8_experts_batched(x, weight, scale, ids, backend="triton")

    for row, expert in enumerate(ids.tolist()):
        expected = oracle.linear_truth(x[row : row + 1], weight[expert], scale[expert], BLOCK_128)
        oracle.assert_matches(out[row : row + 1], expected)


def test_rows_times_columns_beyond_2_to_the_31() -> None:
    """2^20 + 5 rows of 2176 columns out, and of 128 in: the last rows lie behind 2^31."""
    rows, n, k, experts = 2**20 + 5, 2176, 128, 4
    made = [oracle.make_weight(n, k, ROW, device="cuda") for _ in range(experts)]
    weight, scale = (torch.stack(parts) for parts in zip(*made, strict=True))
    x = torch.randn(rows, k, device="cuda").bfloat16()
    ids = torch.randint(0, experts, (rows,), device="cuda")
    order = sort_by_expert(ids, experts)

    out = fp8_experts_grouped(
        x, weight, scale, order.ends, gather=order.gather, scatter=order.scatter, backend="triton"
    )

    for row in (0, 1, 2**19, rows - 2, rows - 1):
        one = int(ids[row])
        expected = oracle.linear_truth(x[row : row + 1], weight[one], scale[one], ROW)
        oracle.assert_matches(out[row : row + 1], expected, min_sqnr=45)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("way", WAYS)
def test_tensors_on_a_device_that_is_not_current(way: str) -> None:
    assert torch.cuda.current_device() == 0
    call = make_call(way, BLOCK_128, 6, 200, 384, 90, bias=torch.float32, device="cuda:1")
    grad = torch.randn(90, 200, device="cuda:1").bfloat16()

    oracle.assert_matches(call.run(backend="triton"), call.truth(), min_sqnr=45)
    assert_gradients(call, *backward(call, grad), grad)
    assert torch.cuda.current_device() == 0
