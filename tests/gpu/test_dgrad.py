"""An FP8 dgrad on the GPU: every backend that takes it, at sizes where its tiles are ragged."""

from __future__ import annotations

import pytest
import torch

import fp8dispatch
from fp8dispatch import BackendUnavailableError, dgrad, fp8_linear, prepare, registry, use_backend
from fp8dispatch.policy import Policy
from fp8dispatch.problem import Dgrad
from fp8dispatch.recipe import BLOCK_128, ROW, Recipe
from tests import fp8_gradients, oracle
from tests.fp8_gradients import every_recipe
from tests.moe.cases import RECIPES, WAYS, make_call
from tests.moe.test_experts_dgrad import backward, wanted

pytestmark = [
    pytest.mark.gpu,
    # What the optional libraries and their dependencies warn of at import is theirs.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]

SIZES = ((1, 256, 512), (3, 272, 1040), (130, 640, 384), (257, 1536, 2048), (5, 200, 300))
BACKENDS = tuple(
    name
    for name in registry.NAMES
    if registry.load(name).quantizes_activations and registry.load(name).rows_per_scale == 1
)


def takes(backend: str, m: int, weight: torch.Tensor, recipe: Recipe, dtype: torch.dtype) -> bool:
    """Whether both products of a call run on the backend; a refusal is a sentence, not a crash."""
    allowed = Policy(only=(backend,), dgrad=Dgrad.FP8)
    try:
        dgrad.explain(m, weight, recipe, dtype, allowed)
    except BackendUnavailableError as error:
        assert f"{backend} needs" in str(error)
        return False
    return True


@every_recipe
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_every_backend(backend: str, recipe: Recipe) -> None:
    ran = 0
    for m, n, k in SIZES:
        weight, scale = oracle.make_weight(n, k, recipe, device="cuda")
        grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
        expected = fp8_gradients.truth(grad, weight, scale, recipe)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if not takes(backend, m, weight, recipe, dtype):
                continue
            ran += 1
            allowed = Policy(only=(backend,), dgrad=Dgrad.FP8)
            got = dgrad.grad_input(grad, weight, scale, recipe, dtype, allowed)
            assert (got.shape, got.dtype) == ((m, k), dtype)
            oracle.assert_matches(got, expected, label=f"{backend} {m}x{n}x{k} {dtype}")
    if backend in ("triton", "eager"):
        assert ran == 3 * len(SIZES)
    if backend == "cublaslt" and recipe in (BLOCK_128, ROW):
        assert ran >= 4


@every_recipe
def test_the_automatic_choice_and_its_backward_pass(recipe: Recipe) -> None:
    """Backward runs on a thread of its own, where no statement of this one is heard."""
    weight, scale = oracle.make_weight(512, 768, recipe, device="cuda")
    x = torch.randn(2, 40, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 40, 512, device="cuda", dtype=torch.bfloat16)
    with use_backend(dgrad="fp8"):
        out = fp8_linear(x, weight, scale, block_size=recipe.block_size)
    (got,) = torch.autograd.grad(out, x, grad)
    oracle.assert_matches(got, fp8_gradients.truth(grad, weight, scale, recipe))
    exact = grad.double().flatten(0, 1) @ oracle.dequantized_weight(weight, scale, recipe)
    ratio = oracle.sqnr(got.flatten(0, 1), exact)
    assert ratio.min() >= fp8_gradients.MIN_SQNR_UNQUANTIZED


def test_compiled_and_captured() -> None:
    fp8 = fp8dispatch.FP8Linear.from_linear(
        torch.nn.Linear(768, 512, device="cuda", dtype=torch.bfloat16)
    )
    x = torch.randn(64, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    with use_backend(dgrad="fp8"):
        (expected,) = torch.autograd.grad(fp8(x), x, grad)
        out = torch.compile(fp8, fullgraph=True)(x)
    (got,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(got, expected)

    # A leaf of its own: autograd binds one to the stream of its first use while graphs of it live.
    stream = torch.cuda.Stream()
    leaf = x.detach().clone().requires_grad_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), use_backend(dgrad="fp8"):
        fp8dispatch.warmup(fp8, [64])
        for _ in range(2):
            torch.autograd.grad(fp8(leaf), leaf, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with use_backend(dgrad="fp8"), torch.cuda.graph(graph, stream=stream):
        (captured,) = torch.autograd.grad(fp8(leaf), leaf, grad)
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_the_transposed_weight_is_kept_and_dropped() -> None:
    weight, scale = oracle.make_weight(512, 768, BLOCK_128, device="cuda")
    x = torch.randn(64, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)

    def backward() -> torch.Tensor:
        with use_backend("-eager", dgrad="fp8"):
            out = fp8_linear(x, weight, scale)
        return torch.autograd.grad(out, x, grad)[0]

    first = backward()
    assert prepare.prepared_bytes(weight) == weight.nbytes
    assert torch.equal(backward(), first)
    weight.copy_(weight.flip(0))
    oracle.assert_matches(backward(), fp8_gradients.truth(grad, weight, scale, BLOCK_128))
    assert prepare.prepared_bytes(weight) == weight.nbytes


@pytest.mark.parametrize("recipe", ["tensor", "row", "128x128"])
@pytest.mark.parametrize("way", WAYS)
def test_experts(way: str, recipe: str) -> None:
    call = make_call(way, RECIPES[recipe], 8, 256, 384, 300, x_dtype=torch.float32, device="cuda")
    grad = torch.randn(300, 256, device="cuda")
    expected = wanted(call, grad)
    for backend in ("eager", "triton", None):
        got = backward(call, grad, backend=backend)
        oracle.assert_matches(got, expected, label=f"{backend}")
    assert torch.equal(backward(call, grad), got), "sums have a fixed order"
