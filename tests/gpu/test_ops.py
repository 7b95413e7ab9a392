"""Compiled by the inductor, with and without CUDA graphs, a call gives the numbers of eager."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fp8dispatch import FP8Linear, QuantizedActivation, fp8_linear, fp8_linear_quantized
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Recipe
from tests import oracle

pytestmark = pytest.mark.gpu

N, K = 384, 512
ROWS = (4, 8, 17, 130)

every_backend = pytest.mark.parametrize("backend", ["cublaslt", "triton", None])
# Torch's own, where its graph trees hold their memory pool with a graph of nothing.
cuda_graphs = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
every_recipe = pytest.mark.parametrize("recipe", [TENSOR, ROW, BLOCK_128], ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(recipe: Recipe, backend: str | None, n: int = N, k: int = K) -> FP8Linear:
    weight, scale = oracle.make_weight(n, k, recipe, device="cuda")
    bias = torch.randn(n, device="cuda", requires_grad=True)
    block = recipe.block_size
    return FP8Linear.from_tensors(weight, scale, bias, block_size=block, backend=backend)


@every_backend
@every_recipe
def test_inductor_equals_eager(recipe: Recipe, backend: str | None) -> None:
    fp8 = layer(recipe, backend)
    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(fp8, backend=counter, fullgraph=True)
    for m in ROWS:
        x = torch.randn(2, m, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(2, m, N, device="cuda", dtype=torch.bfloat16)

        out = run(x)
        got, got_bias = torch.autograd.grad(out, (x, fp8.bias), grad)

        expected = fp8(x)
        wanted, wanted_bias = torch.autograd.grad(expected, (x, fp8.bias), grad)
        assert torch.equal(out, expected)
        assert torch.equal(got, wanted)
        torch.testing.assert_close(got_bias, wanted_bias)  # summed in another order
    assert counter.frame_count == 2


class Block(nn.Module):
    """A gated block: FP8 layers between operators that the inductor fuses."""

    def __init__(self, recipe: Recipe, backend: str | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K, device="cuda", dtype=torch.bfloat16)
        self.up, self.gate = (layer(recipe, backend) for _ in range(2))
        self.down = layer(recipe, backend, K, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Fused in fp32, neighbours of the FP8 layers round elsewhere than operator by operator."""
    assert oracle.sqnr(got.reshape(-1, K), wanted.reshape(-1, K).double()).min() > 25


@every_backend
@every_recipe
def test_inside_a_larger_module(recipe: Recipe, backend: str | None) -> None:
    block = Block(recipe, backend)
    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(block, backend=counter, fullgraph=True)
    for m in ROWS:
        x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
        out, expected = run(x), block(x)
        assert_close(out, expected)
        (got,), (wanted,) = (torch.autograd.grad(y, x, grad) for y in (out, expected))
        assert_close(got, wanted)
    assert counter.frame_count == 2


@cuda_graphs
@every_backend
@every_recipe
def test_cuda_graphs_replay_right_numbers(recipe: Recipe, backend: str | None) -> None:
    """The first call of these weights is the compiled one: nothing was prepared before."""
    fp8 = layer(recipe, backend)
    run = torch.compile(fp8, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for m in (16, 16, 16, 16, 33, 33, 33, 16):
            torch.compiler.cudagraph_mark_step_begin()
            x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
            out = run(x).clone()
            assert torch.equal(out, fp8(x))


@cuda_graphs
@every_backend
@every_recipe
def test_cuda_graphs_in_training(recipe: Recipe, backend: str | None) -> None:
    fp8 = layer(recipe, backend)
    run = torch.compile(fp8, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(16, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(16, N, device="cuda", dtype=torch.bfloat16)
        out = run(x)
        kept = out.detach().clone()
        got, got_bias = (g.clone() for g in torch.autograd.grad(out, (x, fp8.bias), grad))

        expected = fp8(x)
        wanted, wanted_bias = torch.autograd.grad(expected, (x, fp8.bias), grad)
        assert torch.equal(kept, expected)
        assert torch.equal(got, wanted)
        torch.testing.assert_close(got_bias, wanted_bias)


@every_backend
def test_quantised_once_for_several_layers(backend: str | None) -> None:
    weights = [oracle.make_weight(N, K, BLOCK_128, device="cuda") for _ in range(3)]

    def call(x: torch.Tensor) -> list[torch.Tensor]:
        q = QuantizedActivation.from_tensor(x * 2, group_size=128)
        return [fp8_linear_quantized(q, *weight, backend=backend) for weight in weights]

    run = torch.compile(call, fullgraph=True)
    for m in ROWS:
        x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
        for got, wanted in zip(run(x), call(x), strict=True):
            assert torch.equal(got, wanted)


@every_backend
@every_recipe
def test_opcheck(recipe: Recipe, backend: str | None) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device="cuda")
    bias = torch.randn(N, device="cuda", requires_grad=True)
    x = torch.randn(2, 17, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    block = recipe.block_size or (0, 0)
    operators = torch.ops.fp8dispatch
    # The schema check compares arguments with allclose, which takes no FP8; it runs on the CPU.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

    torch.library.opcheck(
        operators.linear.default,
        (x, weight, scale, bias, None, *block, torch.bfloat16, backend or ""),
        test_utils=checks,
    )
    q = QuantizedActivation.from_tensor(x, group_size=block[1] or None)
    torch.library.opcheck(
        operators.linear_quantized.default,
        (q.data, q.scale, weight, scale, bias, *block, torch.bfloat16, backend or ""),
        test_utils=checks,
    )


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch's own
@every_recipe
def test_export(recipe: Recipe) -> None:
    fp8 = layer(recipe, None)
    x = torch.randn(5, K, device="cuda", dtype=torch.bfloat16)
    program = torch.export.export(fp8, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))

    for m in ROWS:
        x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(program.module()(x), fp8(x))


def test_autocast() -> None:
    fp8 = layer(BLOCK_128, None)
    x = torch.randn(5, K, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = torch.compile(fp8, fullgraph=True)(x)

        assert out.dtype == torch.bfloat16
        assert torch.equal(out, fp8_linear(x, fp8.weight, fp8.weight_scale, fp8.bias))
