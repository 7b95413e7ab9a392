"""`FP8Experts` on a GPU: its numbers, its gradients, and graphs whose routing changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fp8dispatch import FP8Experts, warmup
from fp8dispatch.moe import forward
from fp8dispatch.moe.combine import combine, combine_eager
from tests import oracle
from tests.gpu import synchronisation
from tests.moe import reference
from tests.oracle import RECIPES

pytestmark = pytest.mark.gpu

E, INNER, H, TOP_K = 16, 256, 384, 4
BLOCK = RECIPES["block-128x128"]

every_route = pytest.mark.parametrize("route", ["batched", "grouped"])
# Torch's own, where its graph trees hold their memory pool with a graph of nothing.
cuda_graphs = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "GROUPED_FROM", {"batched": 10**9, "grouped": 0}[route])


def make(recipe: Any = BLOCK, *, bias: bool = False) -> FP8Experts:
    weights = {
        "gate_up_proj": torch.randn(E, 2 * INNER, H, device="cuda") * 0.1,
        "down_proj": torch.randn(E, H, INNER, device="cuda") * 0.1,
    }
    if bias:
        weights["gate_up_proj_bias"] = nn.Parameter(torch.randn(E, 2 * INNER, device="cuda"))
        weights["down_proj_bias"] = nn.Parameter(torch.randn(E, H, device="cuda"))
    return FP8Experts.from_weights(weights, recipe, top_k=TOP_K)


def routed(tokens: int, kind: str = "even") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights: spread, all on one expert, or mostly of other ranks."""
    ids, weights = reference.routed(tokens, TOP_K, E, "cuda")
    if kind == "one":
        ids = torch.full_like(ids, 5)
    elif kind == "elsewhere":
        ids = torch.where(torch.rand(ids.shape, device="cuda") < 0.9, E + 3, ids)
        weights = torch.where(ids < E, weights, torch.nan)
    return ids, weights


def expected(
    module: FP8Experts, recipe: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    plain = reference.of_module(module, recipe, quantize=True)
    return plain(x.double(), ids, weights.double())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@every_route
@pytest.mark.parametrize("kind", ["even", "one", "elsewhere"])
def test_numbers(recipe: Any, route: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(route, monkeypatch)
    module = make(recipe, bias=True)
    x = torch.randn(37, H, device="cuda")
    ids, weights = routed(37, kind)

    out = module(x, ids, weights)

    truth = expected(module, recipe, x, ids, weights)
    alive = truth.any(-1)
    assert oracle.sqnr(out[alive], truth[alive]).min() > 35  # an error of 2^-12 moves codes
    assert not out[~alive].any()


@every_route
def test_gradients(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(route, monkeypatch)
    module = make(bias=True)
    plain = reference.of_module(module, BLOCK, quantize=False)
    x = torch.randn(33, H, device="cuda")
    ids, shares = routed(33)
    ids[3, 1], ids[7] = E, -1
    grad = torch.randn(33, H, device="cuda")
    ours = [x.clone().requires_grad_(), shares.clone().requires_grad_()]
    wide = [x.double().requires_grad_(), shares.double().requires_grad_()]

    module(ours[0], ids, ours[1]).backward(grad)
    plain(wide[0], ids, wide[1]).backward(grad.double())

    for one, other in zip(ours, wide, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        noise = (one.grad.double() - other.grad).norm() / other.grad.norm()
        assert -20 * torch.log10(noise) > 18
    assert ours[1].grad is not None
    assert not ours[1].grad[3, 1]
    assert module.get_parameter("down_proj_bias").grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_weighted_sum_is_that_of_plain_torch(dtype: torch.dtype) -> None:
    tokens = 50
    ids, shares = routed(tokens, "elsewhere")
    rows = torch.randn(tokens * TOP_K, H, device="cuda").to(dtype)
    grad = torch.randn(tokens, H, device="cuda").to(dtype)
    results = []

    for compute in (combine, combine_eager):
        given = rows.clone().requires_grad_(), shares.clone().requires_grad_()
        out = compute(given[0], ids.reshape(-1), given[1], E, dtype)
        out.backward(grad)
        results.append((out, given[0].grad, given[1].grad))

    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("tokens", [3, 200])
@every_route
def test_a_captured_forward_follows_the_routing(
    tokens: int, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured once, replayed with other tokens, other experts, one expert, and none."""
    take(route, monkeypatch)
    module = make(bias=True).to(torch.bfloat16)
    warmup(module, [tokens])
    x = torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16)
    ids, weights = routed(tokens)
    graph = torch.cuda.CUDAGraph()

    with torch.no_grad():
        module(x, ids, weights)
        with torch.cuda.graph(graph):
            captured = module(x, ids, weights)
        for kind in ("even", "one", "elsewhere", "even"):
            new_ids, new_weights = routed(tokens, kind)
            x.normal_()
            ids.copy_(new_ids)
            weights.copy_(new_weights)
            captured.fill_(torch.nan)
            graph.replay()
            assert torch.equal(captured, module(x, ids, weights)), kind
            assert bool(captured.isfinite().all()), kind
        ids.fill_(-1)
        graph.replay()
        assert not captured.any()


@cuda_graphs
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@every_route
def test_inductor_equals_eager(mode: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(route, monkeypatch)
    module = make(bias=True).to(torch.bfloat16)
    run = torch.compile(module, mode=mode, fullgraph=True)
    for kind in ("even", "one", "elsewhere", "even"):
        x = torch.randn(24, H, device="cuda", dtype=torch.bfloat16)
        ids, weights = routed(24, kind)
        with torch.no_grad():
            out, wanted = run(x, ids, weights).clone(), module(x, ids, weights)
        # The activation between the matmuls is fused and rounds once instead of twice; some of its
        # values then quantise to the neighbouring number, 28 dB in the worst of 24 rows seen.
        alive = wanted.any(-1)
        assert oracle.sqnr(out[alive], wanted[alive]).min() > 24
        assert oracle.sqnr(out.reshape(1, -1), wanted.reshape(1, -1)) > 30
        assert not out[~alive].any()


def test_nothing_waits_for_the_device() -> None:
    """A forward and a backward pass launch on data that nobody has looked at."""
    module = make(bias=True).to(torch.bfloat16)
    x = torch.randn(40, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids, weights = routed(40)

    def step() -> None:
        for rows in (40, 2):
            module(x[:rows], ids[:rows], weights[:rows]).sum().backward()

    step()  # decides, compiles and checks the scales' values
    torch.cuda.synchronize()

    with synchronisation.forbidden():
        step()
