"""Under torch.compile a call is one operator in one graph, and gives the numbers of eager."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fp8dispatch import (
    FP8Linear,
    FrozenWeightError,
    ScaleValueError,
    ShapeError,
    UnknownBackendError,
    fp8_linear,
    policy,
    registry,
)
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.recipe import Recipe
from tests.oracle import RECIPES, name_of
from tests.test_ops import (
    BLOCK,
    LINEAR,
    ROWS,
    K,
    N,
    backends,
    compiled,
    every_recipe,
    layer,
    parts,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A compiler that keeps the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        self.graphs.append(
            [str(node.target) for node in graph.graph.nodes if node.op[:4] == "call"]
        )
        return graph.forward


def messages(error: BaseException | None) -> str:
    """The texts of an error and of all that led to it."""
    told = []
    while error is not None:
        told.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(told)


def test_a_call_is_one_operator_and_nothing_else() -> None:
    recorder = Recorder()

    compiled(layer(), recorder)(torch.randn(5, K))

    assert recorder.graphs == [[LINEAR]]


@backends
@every_recipe
def test_forward_and_backward_equal_eager(recipe: Recipe, backend: str) -> None:
    fp8 = layer(recipe)
    x = torch.randn(2, 7, K, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 7, N).bfloat16()
    inputs = x, fp8.bias

    out = compiled(fp8, backend)(x)
    grads = torch.autograd.grad(out, inputs, grad)

    expected = fp8(x)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    for got, wanted in zip(grads, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.equal(got, wanted)


@backends
@pytest.mark.parametrize("out_dtype", [None, *ACTIVATION_DTYPES], ids=name_of)
@pytest.mark.parametrize("way", ["plain", "transposed", "static", "attribute", "groups"])
def test_every_way_to_call(way: str, out_dtype: torch.dtype | None, backend: str) -> None:
    recipe = RECIPES["block-48x80" if way == "attribute" else "block-1x32"]
    recipe = recipe if way in ("attribute", "groups") else BLOCK
    weight, scale, bias = parts(recipe)
    options: dict[str, Any] = {"out_dtype": out_dtype}
    if way == "transposed":
        weight, scale = weight.t(), scale.t()
    if way == "static":
        options["activation_scale"] = torch.full((1,), 0.01)
    if way == "attribute":
        weight.block_size = recipe.block_size
    x = torch.randn(6, K, requires_grad=True)

    def call(x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, weight, scale, bias, **options)

    out = compiled(call, backend)(x)

    expected = call(x)
    assert torch.equal(out, expected)
    grad = torch.randn(6, N).to(out.dtype)
    (got,), (wanted,) = (torch.autograd.grad(y, x, grad) for y in (out, expected))
    assert torch.equal(got, wanted)


@backends
@pytest.mark.parametrize("dynamic", [None, True])
def test_other_row_counts_do_not_recompile(dynamic: bool | None, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    fp8 = layer()
    run = compiled(fp8, counter, dynamic=dynamic)

    for m in ROWS:
        x = torch.randn(m, K, requires_grad=True)
        out = run(x)
        assert torch.equal(out, fp8(x))
        out.sum().backward()

    # Without `dynamic`, torch compiles for the first M, and once more for any M.
    assert counter.frame_count == (1 if dynamic else 2)


@backends
def test_weights_that_are_plain_arguments_may_be_dynamic(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    run = compiled(fp8_linear, counter, dynamic=True)

    for m in (5, 17, 40):  # torch takes equal sizes for one and the same, and the scale is [2, 3]
        weight, scale, bias = parts()
        x = torch.randn(m, K)
        assert torch.equal(run(x, weight, scale, bias), fp8_linear(x, weight, scale, bias))

    assert counter.frame_count == 1


@backends
@pytest.mark.parametrize("m", [0, 1])
def test_no_row_and_one_row(m: int, backend: str) -> None:
    fp8 = layer()
    x = torch.randn(m, K, requires_grad=True)

    out = compiled(fp8, backend)(x)

    assert torch.equal(out, fp8(x))
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_a_row_count_that_depends_on_data() -> None:
    fp8 = layer()
    x = torch.randn(9, K)
    keep = torch.arange(9) % 2 == 0

    def call(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return fp8(x[keep])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out = compiled(call, "aot_eager")(x, keep)

    assert torch.equal(out, fp8(x[keep]))


class Mixed(nn.Module):
    """FP8 layers between others, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, K)
        self.up = layer()
        self.norm = nn.LayerNorm(N)
        self.down = FP8Linear.from_linear(nn.Linear(N, K), "row")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.embed(x))
        for _ in range(2):
            x = self.down(nn.functional.gelu(self.norm(self.up(x))))
        return x


def check_mixed(backend: str, tolerance: float) -> None:
    model = Mixed()
    counter = CompileCounterWithBackend(backend)
    run = compiled(model, counter)
    for m in ROWS:
        x = torch.randn(m, 24, requires_grad=True)
        grad = torch.randn(m, K)
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]

        grads = torch.autograd.grad(run(x), trained, grad)

        for got, wanted in zip(grads, torch.autograd.grad(model(x), trained, grad), strict=True):
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert counter.frame_count == 2


@backends
def test_inside_a_larger_module(backend: str) -> None:
    check_mixed(backend, tolerance=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor() -> None:
    fp8 = layer()
    x = torch.randn(5, K, requires_grad=True)

    out = compiled(lambda x: torch.relu(fp8(x * 2)), "inductor")(x)

    expected = torch.relu(fp8(x * 2))
    torch.testing.assert_close(out, expected)
    grad = torch.randn(5, N)
    (got,), (wanted,) = (torch.autograd.grad(y, x, grad) for y in (out, expected))
    torch.testing.assert_close(got, wanted)


@backends
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=name_of)
def test_autocast(x_dtype: torch.dtype, backend: str) -> None:
    fp8 = layer()
    x = torch.randn(5, K).to(x_dtype).requires_grad_()
    grad = torch.randn(5, N).bfloat16()

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fp8(x)

    inside = compiled(call, backend)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = compiled(fp8, backend)(x)
        (got,) = torch.autograd.grad(around, x, grad)

    expected = call(x)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(inside, expected)
    assert torch.equal(around, expected)
    assert torch.equal(got, torch.autograd.grad(expected, x, grad)[0])


BAD_CALLS: dict[str, Callable[[FP8Linear, torch.Tensor], torch.Tensor]] = {
    "needs a weight [N, 299]": lambda fp8, x: fp8(x[:, :-1]),
    "bias must be [200]": lambda fp8, x: fp8_linear(
        x, fp8.weight, fp8.weight_scale, fp8.bias.detach()[1:]
    ),
    "needs a weight_scale [4, 5]": lambda fp8, x: fp8_linear(
        x, fp8.weight, fp8.weight_scale, block_size=(64, 64)
    ),
}


@pytest.mark.parametrize("sentence", BAD_CALLS)
def test_errors_keep_their_sentence(sentence: str) -> None:
    call, fp8 = BAD_CALLS[sentence], layer()
    x = torch.randn(5, K)

    with pytest.raises(ShapeError) as direct:
        torch.compile(lambda x: call(fp8, x), backend="eager")(x)
    with pytest.raises(Exception) as traced:  # of torch._dynamo
        compiled(lambda x: call(fp8, x))(x)

    assert sentence in str(direct.value)
    assert str(direct.value) in messages(traced.value)


def test_an_unknown_backend_is_named_while_tracing() -> None:
    weight, scale, _ = parts()

    with pytest.raises(Exception, match=r"triton.*found 'cublastl'") as traced:
        compiled(lambda x: fp8_linear(x, weight, scale, backend="cublastl"))(torch.randn(5, K))

    error: BaseException | None = traced.value
    while error is not None and not isinstance(error, UnknownBackendError):
        error = error.__cause__ or error.__context__
    assert error is not None


@backends
def test_scale_values_are_checked_when_the_graph_runs(backend: str) -> None:
    fp8 = layer()
    run = compiled(fp8, backend)
    with torch.no_grad():
        run(torch.randn(5, K))
        fp8.weight_scale[0, 0] = math.nan
        with pytest.raises(ScaleValueError, match="found nan"):
            run(torch.randn(5, K))
        fp8.weight_scale[0, 0] = 1.0
        assert run(torch.randn(5, K)).isfinite().all()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that were run, in order."""
    names: list[str] = []
    load = registry.load

    def spy(name: str) -> Any:
        names.append(name)
        return load(name)

    monkeypatch.setattr(registry, "load", spy)
    return names


@backends
def test_the_policy_of_each_run_decides(
    backend: str, device: str, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounterWithBackend(backend)
    weight, scale, bias = parts(device=device)
    other = "triton" if device == "cpu" else "eager"  # than the default order takes
    free = compiled(lambda x: fp8_linear(x, weight, scale, bias), counter)
    forced = compiled(lambda x: fp8_linear(x, weight, scale, bias, backend=other), counter)
    x = torch.randn(5, K, device=device)

    def used(run: Callable[[torch.Tensor], torch.Tensor]) -> str:
        loaded.clear()
        run(x)
        return loaded[-1]

    default = used(free)
    assert default != other
    assert used(forced) == other
    try:
        monkeypatch.setenv(policy.BACKEND_VARIABLE, other)
        policy.reload_environment()
        assert used(free) == other
    finally:
        monkeypatch.delenv(policy.BACKEND_VARIABLE)
        policy.reload_environment()
    assert used(free) == default
    assert counter.frame_count == 2


@backends
@pytest.mark.parametrize("frozen", ["weight", "weight_scale", "activation_scale"])
@pytest.mark.parametrize("x_needs_grad", [False, True])
def test_frozen_tensors_raise_in_backward_only(
    frozen: str, x_needs_grad: bool, backend: str
) -> None:
    weight, scale, bias = parts()
    tensors = {
        "weight": weight,
        "weight_scale": scale,
        "activation_scale": torch.full((1,), 0.01),
    }
    tensors[frozen] = nn.Parameter(tensors[frozen])
    x = torch.randn(5, K, requires_grad=x_needs_grad)

    out = compiled(lambda x: fp8_linear(x, bias=bias, **tensors), backend)(x)

    with pytest.raises(FrozenWeightError, match=rf"^{frozen} requires grad"):
        out.sum().backward()


@backends
def test_gradient_checkpointing(backend: str) -> None:
    fp8 = layer()
    x = torch.randn(5, K, requires_grad=True)
    inputs = x, fp8.bias

    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: fp8(torch.tanh(x)), x, use_reentrant=False).square().sum()

    grads = torch.autograd.grad(compiled(call, backend)(x), inputs)

    for got, wanted in zip(grads, torch.autograd.grad(call(x), inputs), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("transform", "sentence"), [("vmap", "torch.func.vmap"), ("grad", "functorch transforms")]
)
def test_torch_func_inside_of_a_graph_is_refused(transform: str, sentence: str) -> None:
    weight, scale, _ = parts()

    def call(x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, weight, scale).sum()

    with pytest.raises(Exception, match=sentence):  # of torch._dynamo
        compiled(getattr(torch.func, transform)(call))(torch.randn(3, 5, K))
