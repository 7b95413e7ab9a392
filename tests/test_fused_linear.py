"""The trainable composites: outputs of the steps apart, gradients of fp32 autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fp8dispatch import (
    BackendUnavailableError,
    DTypeError,
    FrozenWeightError,
    ShapeError,
    UnsupportedTransformError,
    dequantized_grad,
    fp8_linear,
    rms_norm_linear,
    silu_mul_linear,
)
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.quantization import fused
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.oracle import RECIPES, name_of

EPS = 1e-5
K, N = 96, 80
BLOCK = RECIPES["block-48x80"]
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
inputs = pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=name_of)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def leaf(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().requires_grad_()


def assert_close(got: torch.Tensor, wanted: torch.Tensor, decibels: float) -> None:
    assert got.shape == wanted.shape
    rows = got.reshape(-1, got.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    assert oracle.sqnr(*rows).min() > decibels


# The weight and dY are rounded to dY's dtype, so a 16-bit gradient has its noise.
DECIBELS = {torch.bfloat16: 40.0, torch.float16: 55.0, torch.float32: 100.0}


@inputs
@every_recipe
def test_norm_and_its_gradients(recipe: Recipe, dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    true_weight = oracle.dequantized_weight(weight, scale, recipe).float()
    x, gain = leaf(2, 5, K, dtype=dtype, device=device), leaf(K, dtype=dtype, device=device)
    bias = leaf(N, device=device)

    out = rms_norm_linear(x, gain, EPS, weight, scale, bias, block_size=recipe.block_size)
    grad = torch.randn(out.shape, device=device).to(dtype)
    got = torch.autograd.grad(out, (x, gain, bias), grad)

    assert (out.shape, out.dtype) == ((2, 5, N), dtype)
    true_x, true_gain, true_bias = wide(x), wide(gain), wide(bias)
    hidden = norm(true_x, true_gain)
    apart = fp8_linear(hidden, weight, scale, true_bias, block_size=recipe.block_size)
    assert_close(out, apart, 40)
    true_out = hidden @ true_weight.t() + true_bias
    wanted = torch.autograd.grad(true_out, (true_x, true_gain, true_bias), grad.float())
    assert [part.dtype for part in got] == [dtype, dtype, torch.float32]
    for found, expected in zip(got, wanted, strict=True):
        assert_close(found, expected, DECIBELS[dtype])


@inputs
def test_residual_and_its_gradients(dtype: torch.dtype, device: str) -> None:
    """The sum goes on to the next layer, so both outputs send gradients back."""
    weight, scale = oracle.make_weight(N, K, BLOCK, device=device)
    true_weight = oracle.dequantized_weight(weight, scale, BLOCK).float()
    x, residual = (leaf(7, K, dtype=dtype, device=device) for _ in range(2))
    gain = leaf(K, device=device)
    block = {"block_size": BLOCK.block_size}

    out, total = rms_norm_linear(x, gain, EPS, weight, scale, residual=residual, **block)
    grads = (torch.randn(7, N, device=device).to(dtype), torch.randn(7, K, device=device).to(dtype))
    got = torch.autograd.grad((out, total), (x, residual, gain), grads)

    assert torch.equal(total, x + residual)
    true_x, true_residual, true_gain = wide(x), wide(residual), wide(gain)
    sums = true_x + true_residual
    true_out = norm(sums, true_gain) @ true_weight.t()
    wanted = torch.autograd.grad(
        (true_out, sums), (true_x, true_residual, true_gain), [part.float() for part in grads]
    )
    for found, expected in zip(got, wanted, strict=True):
        assert_close(found, expected, DECIBELS[dtype])


def test_a_loss_of_the_sum_or_of_the_output_alone(device: str) -> None:
    weight, scale = oracle.make_weight(N, K, BLOCK, device=device)
    x, residual, gain = leaf(3, K, device=device), leaf(3, K, device=device), leaf(K, device=device)

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm_linear(
            x, gain, EPS, weight, scale, residual=residual, block_size=BLOCK.block_size
        )

    out, total = outputs()
    of_sum = torch.autograd.grad(total.sum(), (x, residual))
    of_out = torch.autograd.grad(outputs()[0].sum(), (x, gain))

    assert all(torch.equal(part, torch.ones_like(part)) for part in of_sum)
    assert all(part.abs().max() > 0 for part in of_out)
    assert torch.equal(out, outputs()[0])


@inputs
@every_recipe
def test_product_and_its_gradients(recipe: Recipe, dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    true_weight = oracle.dequantized_weight(weight, scale, recipe).float()
    joint = leaf(6, 2 * K, dtype=dtype, device=device)
    bias = leaf(N, device=device)

    out = silu_mul_linear(*joint.chunk(2, -1), weight, scale, bias, block_size=recipe.block_size)
    grad = torch.randn(out.shape, device=device).to(dtype)
    got = torch.autograd.grad(out, (joint, bias), grad)

    true_joint, true_bias = wide(joint), wide(bias)
    product = gated(*true_joint.chunk(2, -1))
    apart = fp8_linear(product, weight, scale, true_bias, block_size=recipe.block_size)
    assert_close(out, apart, 40)
    true_out = product @ true_weight.t() + true_bias
    wanted = torch.autograd.grad(true_out, (true_joint, true_bias), grad.float())
    for found, expected in zip(got, wanted, strict=True):
        assert_close(found, expected, DECIBELS[dtype])


def test_a_transposed_weight_and_another_output_dtype(device: str) -> None:
    recipe = RECIPES["block-1x32"]
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    x, gain = leaf(4, K, device=device), leaf(K, device=device)
    results = []
    for matrix, grid in ((weight, scale), (weight.t(), scale.t())):
        out = rms_norm_linear(
            x, gain, EPS, matrix, grid, block_size=recipe.block_size, out_dtype=torch.float16
        )
        assert out.dtype == torch.float16
        results.append((out, *torch.autograd.grad(out.sum(), (x, gain))))

    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_weights_own_block_size_holds(device: str) -> None:
    weight, scale = oracle.make_weight(N, K, BLOCK, device=device)
    x, gain = leaf(4, K, device=device), leaf(K, device=device)
    stated = rms_norm_linear(x, gain, EPS, weight, scale, block_size=BLOCK.block_size)
    weight.block_size = list(BLOCK.block_size or ())

    carried = rms_norm_linear(x, gain, EPS, weight, scale)

    assert torch.equal(carried, stated)
    carried.sum().backward()


def layers(device: str) -> dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]:
    weight, scale = oracle.make_weight(N, K, BLOCK, device=device)
    block = {"block_size": BLOCK.block_size}

    def normed(x: torch.Tensor, gain: torch.Tensor, **others: Any) -> torch.Tensor:
        return rms_norm_linear(x, gain, EPS, weight, scale, **block, **others)

    def product(gate: torch.Tensor, up: torch.Tensor, **others: Any) -> torch.Tensor:
        return silu_mul_linear(gate, up, weight, scale, **block, **others)

    return {
        "norm": (normed, (leaf(4, K, device=device), leaf(K, device=device))),
        "product": (product, (leaf(4, K, device=device), leaf(4, K, device=device))),
    }


both = pytest.mark.parametrize("name", ["norm", "product"])


@both
def test_checkpointing_autocast_and_func_grad(name: str, device: str) -> None:
    layer, arguments = layers(device)[name]
    plain = torch.autograd.grad(layer(*arguments).square().sum(), arguments)

    recomputed = checkpoint(layer, *arguments, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(recomputed.square().sum(), arguments), plain))
    functional = torch.func.grad(lambda *parts: layer(*parts).square().sum(), argnums=(0, 1))
    assert all(map(torch.equal, functional(*(part.detach() for part in arguments)), plain))
    single = torch.func.grad(lambda part: layer(part, arguments[1]).square().sum())
    assert torch.equal(single(arguments[0].detach()), plain[0])
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer(*arguments)
        assert out.dtype == torch.bfloat16
        for part, wanted in zip(
            torch.autograd.grad(out.float().square().sum(), arguments), plain, strict=True
        ):
            assert part.dtype == torch.float32
            assert_close(part, wanted, 35)


@both
def test_kernels_and_plain_torch_train_alike(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU the interpreter stands in for a GPU that runs our kernels."""
    layer, arguments = layers(device)[name]
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(fused, "runs_kernels", lambda device, answer=kernels: answer)
        monkeypatch.setattr(dequantized_grad, "runs_kernels", lambda device, answer=kernels: answer)
        out = layer(*arguments, out_dtype=torch.bfloat16)
        results.append((out, *torch.autograd.grad(out.sum(), arguments)))

    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, 40)


@both
@pytest.mark.parametrize("frozen", ["weight", "weight_scale"])
def test_weight_and_scale_are_frozen_in_backward_only(name: str, frozen: str) -> None:
    weight, scale = oracle.make_weight(N, K, RECIPES["row"])
    parts = {"weight": weight, "weight_scale": scale}
    parts[frozen] = torch.nn.Parameter(parts[frozen])
    x = leaf(4, K)

    if name == "norm":
        out = rms_norm_linear(x, torch.ones(K), EPS, **parts)
    else:
        out = silu_mul_linear(x, x, **parts)

    with pytest.raises(FrozenWeightError, match=rf"^{frozen} requires grad"):
        out.sum().backward()


@both
def test_what_is_refused(name: str) -> None:
    layer, (first, second) = layers("cpu")[name]

    with pytest.raises(UnsupportedTransformError, match="vmap"):
        torch.func.vmap(lambda part: layer(part, second))(first[None])
    with pytest.raises(ShapeError):
        layer(first[:, :8], second)
    with pytest.raises(DTypeError, match="out_dtype must be one of"):
        layer(first, second, out_dtype=torch.int8)
    with pytest.raises(ShapeError, match="bias must be"):
        layer(first, second, bias=torch.ones(N + 1))
    with pytest.raises(BackendUnavailableError):
        layer(first, second, backend="torchao")


@both
def test_a_second_gradient_is_refused_and_never_left_out(name: str) -> None:
    """The gradient depends on the inputs even where dY is a constant."""
    layer, (first, second) = layers("cpu")[name]

    (once,) = torch.autograd.grad(layer(first, second).sum(), first, create_graph=True)

    with pytest.raises(RuntimeError, match="has no gradient; differentiate once"):
        (once.square().sum() + first.sum()).backward()
    once = torch.func.grad(lambda part: layer(part, second).sum())(first)
    with pytest.raises(RuntimeError, match="has no gradient; differentiate once"):
        (once.square().sum() + first.sum()).backward()


@both
def test_nothing_is_kept_that_backward_does_not_need(name: str) -> None:
    layer, arguments = layers("cpu")[name]
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(*arguments)
        kept = [tensor.data_ptr() for tensor in saved]
        saved.clear()
        layer(*(part.detach() for part in arguments))

    assert len(kept) == 4, "weight, scale and the two inputs"
    assert {part.data_ptr() for part in arguments} <= set(kept)
    assert saved == []


@both
def test_compiled_meta_and_empty(name: str) -> None:
    torch._dynamo.reset()
    layer, arguments = layers("cpu")[name]
    grad = torch.randn(4, N)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(*arguments)
    got = torch.autograd.grad(compiled, arguments, grad)

    eager = layer(*arguments)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(got, torch.autograd.grad(eager, arguments, grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    none = layer(arguments[0][:0], arguments[1][:0] if name == "product" else arguments[1])
    assert none.shape == (0, N)
    none.sum().backward()
    torch._dynamo.reset()

    weight, scale = (
        torch.empty(N, K, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(N, 1, device="meta"),
    )
    x = torch.empty(2, 3, K, device="meta", requires_grad=True)
    if name == "norm":
        out, total = rms_norm_linear(
            x, torch.ones(K, device="meta"), EPS, weight, scale, residual=x
        )
        assert total.shape == x.shape
    else:
        out = silu_mul_linear(x, x, weight, scale)
    assert out.shape == (2, 3, N)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
