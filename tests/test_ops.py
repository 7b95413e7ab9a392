"""The operators pass torch's own checks, and stand for a call in fake and exported programs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fp8dispatch import (
    FP8Linear,
    QuantizedActivation,
    ShapeError,
    UnsupportedTransformError,
    fp8_linear,
    fp8_linear_quantized,
    graph_policy,
    use_backend,
)
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.policy import Policy
from fp8dispatch.problem import Dgrad
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.oracle import RECIPES, name_of

N, K = 200, 300
BLOCK = RECIPES["block-128x128"]
ROWS = (2, 3, 17, 40)
LINEAR = "fp8dispatch.linear.default"

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
backends = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parts(
    recipe: Recipe = BLOCK, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, its scale and a bias that is trained."""
    bias = torch.randn(N, device=device, requires_grad=True)
    return *oracle.make_weight(N, K, recipe, device=device), bias


def layer(recipe: Recipe = BLOCK, **options: Any) -> FP8Linear:
    return FP8Linear.from_tensors(*parts(recipe), block_size=recipe.block_size, **options)


def compiled(
    call: Callable[..., Any], backend: Any = "eager", **options: Any
) -> Callable[..., Any]:
    return torch.compile(call, backend=backend, fullgraph=True, **options)


@pytest.fixture
def bytes_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's schema check compares arguments with `allclose`, which has no FP8 kernel."""
    allclose = torch.allclose

    def compare(one: torch.Tensor, other: torch.Tensor, **options: Any) -> bool:
        if one.dtype.is_floating_point and one.dtype.itemsize == 1:
            one, other = one.view(torch.uint8), other.view(torch.uint8)
        return allclose(one, other, **options)

    monkeypatch.setattr(torch, "allclose", compare)


def arguments_of(name: str, recipe: Recipe, lead: tuple[int, ...]) -> tuple[Any, ...]:
    weight, scale, bias = parts(recipe)
    block = recipe.block_size or (0, 0)
    x = torch.randn(*lead, K, requires_grad=True)
    if name == "linear":
        return x, weight, scale, bias, None, *block, torch.bfloat16, ""
    if name == "linear_grad_input":
        return torch.randn(*lead, N), weight, scale, K, *block, torch.bfloat16
    if name == "quantize_activation":
        return x.detach(), None, block[1], torch.float8_e4m3fn
    q = QuantizedActivation.from_tensor(x, group_size=block[1] or None)
    return q.data, q.scale, weight, scale, bias, *block, torch.float16, "eager"


@pytest.mark.usefixtures("bytes_compare")
@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "name", ["linear", "linear_quantized", "linear_grad_input", "quantize_activation"]
)
@every_recipe
def test_opcheck(recipe: Recipe, name: str, lead: tuple[int, ...]) -> None:
    operator = getattr(torch.ops.fp8dispatch, name).default

    torch.library.opcheck(operator, arguments_of(name, recipe, lead))


@pytest.mark.usefixtures("bytes_compare")
@pytest.mark.parametrize("name", ["linear", "linear_grad_input"])
@pytest.mark.parametrize("recipe", ["tensor", "row", "block-128x128"])
def test_opcheck_with_an_fp8_dgrad(recipe: str, name: str) -> None:
    operator = getattr(torch.ops.fp8dispatch, name).default
    allowed = Policy(dgrad=Dgrad.FP8)
    with use_backend(dgrad="fp8"):
        arguments = arguments_of(name, RECIPES[recipe], (2, 3))
        torch.library.opcheck(operator, (*arguments, graph_policy.encode(allowed)))


@pytest.mark.usefixtures("bytes_compare")
def test_opcheck_of_other_layouts() -> None:
    weight, scale, bias = parts()
    x = torch.randn(K, 5).t().requires_grad_()
    static = torch.full((1,), 0.01)
    operators = torch.ops.fp8dispatch

    for args in (
        (x, weight.t(), scale.t(), bias, static, 128, 128, torch.float32, ""),
        (x.detach()[0], weight, scale.half(), None, None, 128, 128, torch.float16, ""),
        (x.detach()[:0], weight, scale, bias, None, 128, 128, torch.bfloat16, ""),
    ):
        torch.library.opcheck(operators.linear.default, args)
    grad = torch.ones(1, 1).expand(5, N)
    args = (grad, weight.t(), scale.t(), K, 128, 128, torch.float32)
    torch.library.opcheck(operators.linear_grad_input.default, args)
    args = (x.detach(), static, 0, torch.float8_e4m3fnuz)
    torch.library.opcheck(operators.quantize_activation.default, args)


def test_an_eager_call_does_not_pass_through_torch_library() -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(op.namespace)
            return op(*args, **(kwargs or {}))

    x, fp8 = torch.randn(5, K), layer()
    with Watch():
        fp8(x).sum().backward()
        QuantizedActivation.from_tensor(x)
        with torch.no_grad():
            fp8(x)

    assert set(seen) == {"aten"}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode
def test_transforms_without_a_meaning_are_refused() -> None:
    weight, scale, bias = parts()
    x = torch.randn(3, 5, K)
    operators = torch.ops.fp8dispatch
    rest = (weight, scale, bias, None, 128, 128, torch.float32, "")

    with pytest.raises(UnsupportedTransformError, match="vmap"):
        torch.func.vmap(lambda x: operators.linear(x, *rest))(x)
    trained, grad = x.clone().requires_grad_(), torch.randn(3, 5, N, requires_grad=True)
    out = operators.linear(trained, *rest)
    (once,) = torch.autograd.grad(out, trained, grad, create_graph=True)
    with pytest.raises(UnsupportedTransformError, match="has no gradient"):
        once.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError):
            operators.linear(dual, *rest)


# Torch's own, in copying an exported program and in reading it from a file.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic: bool, strict: bool) -> None:
    model = nn.Sequential(nn.Linear(24, K), layer(), nn.GELU())
    x = torch.randn(5, 24)
    shapes = ({0: torch.export.Dim("rows")},) if dynamic else None

    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)

    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count(LINEAR) == 1
    for module in (program, torch.export.load(file), program.run_decompositions()):
        again = module.module()
        for m in ROWS if dynamic else (5,):
            x = torch.randn(m, 24, requires_grad=True)
            assert torch.equal(again(x), model(x))
            got, wanted = (torch.autograd.grad(y(x).sum(), x)[0] for y in (again, model))
            assert torch.equal(got, wanted)


@every_recipe
@pytest.mark.parametrize("out_dtype", [None, *ACTIVATION_DTYPES], ids=name_of)
def test_fake_tensors(recipe: Recipe, out_dtype: torch.dtype | None) -> None:
    real = parts(recipe)
    with FakeTensorMode() as mode:
        x = torch.empty(2, 7, K, dtype=torch.float16, requires_grad=True)
        weight, scale, bias = (mode.from_tensor(tensor) for tensor in real)
        out = fp8_linear(x, weight, scale, bias, block_size=recipe.block_size, out_dtype=out_dtype)
        grad, grad_bias = torch.autograd.grad(out.sum(), (x, bias))
        group = recipe.block_size[1] if recipe.block_size else None
        q = QuantizedActivation.from_tensor(x, group_size=group)
        shared = fp8_linear_quantized(q, weight, scale, block_size=recipe.block_size)

    assert (out.shape, out.dtype, out.device) == ((2, 7, N), out_dtype or x.dtype, x.device)
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    assert (grad_bias.shape, grad_bias.dtype) == (bias.shape, bias.dtype)
    assert (shared.shape, shared.dtype) == ((2, 7, N), torch.bfloat16)
    assert (q.data.shape, q.data.dtype) == (x.shape, torch.float8_e4m3fn)


def test_fake_tensors_are_checked_like_real_ones() -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=r"needs a weight \[N, 299\]"):
        FP8Linear(K, N)(torch.empty(5, K - 1))


@backends
def test_quantised_once_for_several_layers(backend: str) -> None:
    weights = [parts() for _ in range(3)]

    def call(x: torch.Tensor) -> list[torch.Tensor]:
        q = QuantizedActivation.from_tensor(x, group_size=128)
        return [fp8_linear_quantized(q, weight, scale, bias) for weight, scale, bias in weights]

    counter = CompileCounterWithBackend(backend)
    run = compiled(call, counter)
    for m in ROWS:
        x = torch.randn(2, m, K, requires_grad=True)
        outs, expected = run(x), call(x)
        for got, wanted, (_, _, bias) in zip(outs, expected, weights, strict=True):
            assert torch.equal(got, wanted)
            grads = (
                torch.autograd.grad(y.sum(), bias, retain_graph=True)[0] for y in (got, wanted)
            )
            assert torch.equal(*grads)
    assert counter.frame_count == 2


@backends
def test_quantised_activations_as_arguments(backend: str) -> None:
    weight, scale, bias = parts(RECIPES["row"])
    static = torch.full((1,), 0.02)

    def quantize(x: torch.Tensor, scale: torch.Tensor | None) -> QuantizedActivation:
        return QuantizedActivation.from_tensor(x, scale=scale)

    def call(q: QuantizedActivation) -> torch.Tensor:
        return fp8_linear_quantized(q, weight, scale, bias, out_dtype=torch.float32)

    for given in (None, static):
        q = quantize(torch.randn(4, K), given)
        assert torch.equal(compiled(call, backend)(q), call(q))
        x = torch.randn(4, K)
        got, wanted = compiled(quantize, backend)(x, given), quantize(x, given)
        assert torch.equal(got.data.view(torch.uint8), wanted.data.view(torch.uint8))
        assert torch.equal(got.scale, wanted.scale)
        assert got.scale.stride() == wanted.scale.stride()


def test_a_quantised_static_scale_may_be_overwritten() -> None:
    static = torch.full((1,), 0.02)
    x = torch.randn(4, K)

    def call(x: torch.Tensor) -> QuantizedActivation:
        return QuantizedActivation.from_tensor(x, scale=static)

    compiled(call)(x).scale.zero_()

    assert compiled(call)(x).scale.item() == pytest.approx(0.02)
