"""Gradients: dX through the dequantised weight, dBias, and nothing kept that is not needed."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fp8dispatch
from fp8dispatch import (
    FrozenWeightError,
    UnsupportedTransformError,
    dequantized_grad,
    fp8_linear,
    registry,
)
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, SCALE_DTYPES
from fp8dispatch.quantization import weight as weight_module
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.oracle import RECIPES, name_of

if TYPE_CHECKING:
    from collections.abc import Callable

N, K = 200, 300
BLOCK = RECIPES["block-128x128"]

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def block_layer(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle.make_weight(N, K, BLOCK, device=device)


@every_recipe
@pytest.mark.parametrize("out_dtype", [None, *ACTIVATION_DTYPES], ids=name_of)
@pytest.mark.parametrize("x_dtype", ACTIVATION_DTYPES, ids=name_of)
def test_gradient_of_x(
    recipe: Recipe, x_dtype: torch.dtype, out_dtype: torch.dtype | None, device: str
) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    x = torch.randn(2, 7, K, device=device).to(x_dtype).requires_grad_()
    out = fp8_linear(x, weight, scale, block_size=recipe.block_size, out_dtype=out_dtype)
    grad = torch.randn(out.shape, device=device).to(out.dtype)

    (got,) = torch.autograd.grad(out, x, grad)

    assert (got.shape, got.dtype) == (x.shape, x_dtype)
    oracle.assert_gradient(got, grad, oracle.dequantized_weight(weight, scale, recipe))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("weight_dtype", FLOAT8_DTYPES, ids=name_of)
def test_gradient_of_x_for_every_weight(
    weight_dtype: torch.dtype, scale_dtype: torch.dtype, device: str
) -> None:
    for recipe in RECIPES.values():
        weight, scale = oracle.make_weight(
            N, K, recipe, dtype=weight_dtype, scale_dtype=scale_dtype, device=device
        )
        x = torch.randn(3, K, device=device, requires_grad=True)
        grad = torch.randn(3, N, device=device)
        true_weight = oracle.dequantized_weight(weight, scale, recipe)
        flipped = scale if recipe.block_size is None else scale.t()
        for matrix, grid in ((weight, scale), (weight.t(), flipped)):
            out = fp8_linear(x, matrix, grid, block_size=recipe.block_size)

            (got,) = torch.autograd.grad(out, x, grad)

            oracle.assert_gradient(got, grad, true_weight, label=f"{recipe}, {matrix.stride()}")


@pytest.mark.parametrize("out_dtype", ACTIVATION_DTYPES, ids=name_of)
@pytest.mark.parametrize("bias_dtype", ACTIVATION_DTYPES, ids=name_of)
def test_gradient_of_the_bias_is_summed_in_fp32(
    bias_dtype: torch.dtype, out_dtype: torch.dtype, device: str
) -> None:
    weight, scale = block_layer(device)
    bias = torch.zeros(N, device=device, dtype=bias_dtype, requires_grad=True)
    # Summed one by one in 16 bits, ones stop adding up at 256 (bf16) or 2048 (fp16).
    x = torch.zeros(3, 1000, K, device=device, dtype=out_dtype)

    out = fp8_linear(x, weight, scale, bias)
    ones, random = torch.ones_like(out), torch.randn(out.shape, device=device).to(out.dtype)
    (of_ones,) = torch.autograd.grad(out, bias, ones, retain_graph=True)
    (of_random,) = torch.autograd.grad(out, bias, random)

    assert torch.equal(of_ones, torch.full_like(bias, 3000))
    oracle.assert_bias_gradient(of_random, random, bias)


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What backward dequantises: (first column, last column + 1, elements) of each strip."""
    made: list[tuple[int, int, int]] = []

    def spy(*args: Any) -> torch.Tensor:
        piece = weight_module.dequantize_strip(*args)
        made.append((args[4].start, args[4].stop, piece.numel()))
        return piece

    monkeypatch.setattr(dequantized_grad, "dequantize_strip", spy)
    return made


@every_recipe
def test_strips_bound_what_is_materialised(
    recipe: Recipe,
    device: str,
    strips: list[tuple[int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device)

    def backward() -> torch.Tensor:
        out = fp8_linear(x, weight, scale, block_size=recipe.block_size)
        return torch.autograd.grad(out, x, grad)[0]

    whole = backward()
    assert strips == [(0, K, N * K)]
    strips.clear()
    monkeypatch.setattr(dequantized_grad, "STRIP_ELEMENTS", N * 130)

    in_strips = backward()

    assert len(strips) >= 3
    assert max(elements for _, _, elements in strips) <= N * 130
    assert (strips[0][0], strips[-1][1]) == (0, K)
    assert all(before[1] == after[0] for before, after in pairwise(strips))
    # A GEMM of another width may add in another order; nothing else may differ.
    torch.testing.assert_close(in_strips, whole, rtol=1e-5, atol=1e-5)
    oracle.assert_gradient(in_strips, grad, oracle.dequantized_weight(weight, scale, recipe))


def test_one_block_is_the_least_that_a_strip_holds(
    device: str, strips: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(5, K, device=device, requires_grad=True)
    monkeypatch.setattr(dequantized_grad, "STRIP_ELEMENTS", 1)

    fp8_linear(x, *block_layer(device)).sum().backward()

    assert [stop - start for start, stop, _ in strips] == [128, 128, 44]


@pytest.mark.parametrize("frozen", ["weight", "weight_scale", "activation_scale"])
@pytest.mark.parametrize("x_needs_grad", [False, True])
def test_weight_and_scales_are_frozen_in_backward_only(
    frozen: str, x_needs_grad: bool, device: str
) -> None:
    weight, scale = block_layer(device)
    tensors = {
        "weight": weight,
        "weight_scale": scale,
        "activation_scale": torch.full((1,), 0.01, device=device),
    }
    # A Parameter requires grad by default, so forward must take it.
    tensors[frozen] = torch.nn.Parameter(tensors[frozen])
    x = torch.randn(5, K, device=device, requires_grad=x_needs_grad)

    out = fp8_linear(x, **tensors)

    with pytest.raises(FrozenWeightError, match=rf"^{frozen} requires grad"):
        out.sum().backward()
    with torch.no_grad():
        assert not fp8_linear(x, **tensors).requires_grad


def saved_by(call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return saved


@every_recipe
def test_only_what_backward_needs_is_saved(recipe: Recipe, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    bias = torch.randn(N, device=device, requires_grad=True)
    x = torch.randn(5, K, device=device)
    trained = x.clone().requires_grad_()
    options = {"block_size": recipe.block_size}

    for_x = saved_by(lambda: fp8_linear(trained, weight, scale, bias, **options))
    for_bias = saved_by(lambda: fp8_linear(x, weight, scale, bias, **options))

    assert [tensor.data_ptr() for tensor in for_x] == [weight.data_ptr(), scale.data_ptr()]
    assert for_bias == []


def test_x_is_freed_before_backward(device: str) -> None:
    weight, scale = block_layer(device)
    leaf = torch.randn(5, K, device=device, requires_grad=True)
    x = leaf * 2
    alive = weakref.ref(x.untyped_storage())

    out = fp8_linear(x, weight, scale)
    del x

    assert alive() is None
    out.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, device: str) -> None:
    weight, scale = block_layer(device)
    bias = torch.randn(N, device=device, requires_grad=True)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(torch.tanh(x), weight, scale, bias)

    layer(x).backward(grad)
    plain = x.grad, bias.grad
    x.grad = bias.grad = None

    checkpoint(layer, x, use_reentrant=use_reentrant).backward(grad)

    assert torch.equal(x.grad, plain[0])
    assert torch.equal(bias.grad, plain[1])


@pytest.mark.parametrize("x_dtype", ACTIVATION_DTYPES, ids=name_of)
def test_autocast(x_dtype: torch.dtype, device: str) -> None:
    weight, scale = block_layer(device)
    bias = torch.randn(N, device=device, requires_grad=True)
    x = torch.randn(5, K, device=device).to(x_dtype).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fp8_linear(x, weight, scale, bias)
    grad = torch.randn(5, N, device=device).bfloat16()

    # Backward may run under autocast as well; its sums stay what they are.
    with torch.autocast(device, dtype=torch.bfloat16):
        got, got_bias = torch.autograd.grad(out, (x, bias), grad)

    assert out.dtype == torch.bfloat16
    assert got.dtype == x_dtype
    oracle.assert_gradient(got, grad, oracle.dequantized_weight(weight, scale, BLOCK))
    oracle.assert_bias_gradient(got_bias, grad, bias)


def test_an_input_used_twice_sums_its_gradients(device: str) -> None:
    first, second = block_layer(device), block_layer(device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    bias = torch.randn(N, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device)
    parts = [
        torch.autograd.grad(fp8_linear(x, *layer, bias), (x, bias), grad)
        for layer in (first, second)
    ]

    (fp8_linear(x, *first, bias) + fp8_linear(x, *second, bias)).backward(grad)

    torch.testing.assert_close(x.grad, parts[0][0] + parts[1][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(bias.grad, parts[0][1] + parts[1][1], rtol=0, atol=1e-5)


def test_gradient_of_a_gradient_is_refused(device: str) -> None:
    weight, scale = block_layer(device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grad = torch.randn(5, N, device=device, requires_grad=True)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: fp8_linear(x, weight, scale).square().sum())(x)

    (once,) = torch.autograd.grad(fp8_linear(x, weight, scale), x, grad, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()
    # Zeros would be silently wrong: the loss is quadratic.
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: gradient(x).sum())(x.detach())


def test_func_grad(device: str) -> None:
    weight, scale = block_layer(device)
    bias = torch.randn(N, device=device)
    x = torch.randn(5, K, device=device)

    def loss(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, weight, scale, bias).square().sum()

    got, got_bias = torch.func.grad(loss, argnums=(0, 1))(x, bias)

    leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert torch.equal(got, expected[0])
    assert torch.equal(got_bias, expected[1])


@pytest.mark.parametrize("batched", ["X", "weight", "weight_scale", "bias", "activation_scale"])
def test_vmap_is_refused(batched: str, device: str) -> None:
    weight, scale = block_layer(device)
    arguments = {
        "X": torch.randn(5, K, device=device),
        "weight": weight,
        "weight_scale": scale,
        "bias": torch.randn(N, device=device),
        "activation_scale": torch.ones(1, device=device),
    }
    one = arguments.pop(batched)
    many = one.view(torch.uint8)[None].view(one.dtype)

    def call(part: torch.Tensor) -> torch.Tensor:
        return fp8_linear(**arguments, **{batched: part})

    with pytest.raises(UnsupportedTransformError, match="vmap"):
        torch.func.vmap(call)(many)


def test_batched_gradients_are_refused_and_never_summed(device: str) -> None:
    """jacrev runs backward under vmap; summing its batch away would be silently wrong."""
    weight, scale = block_layer(device)
    x, bias = torch.randn(1, K, device=device), torch.randn(N, device=device)

    for argument in (0, 1):
        with pytest.raises(UnsupportedTransformError, match="vmap"):
            torch.func.jacrev(lambda x, bias: fp8_linear(x, weight, scale, bias), argument)(x, bias)


def test_nothing_is_recorded_without_gradients(device: str) -> None:
    weight, scale = block_layer(device)
    x = torch.randn(5, K, device=device, requires_grad=True)

    with torch.no_grad():
        assert fp8_linear(x, weight, scale).grad_fn is None
    with torch.inference_mode():
        assert fp8_linear(x, weight, scale).grad_fn is None
    assert fp8_linear(x.detach(), weight, scale).grad_fn is None
    assert fp8_linear(x, weight, scale).grad_fn is not None


@pytest.mark.parametrize("stated", ["by the argument", "by a decorator"])
def test_recomputation_on_other_threads_keeps_the_backend_of_the_call(
    stated: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scale = block_layer(device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    used: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        backend = registry.load(name)
        matmul = backend.matmul

        def watched(*arguments: Any) -> torch.Tensor:
            used.append((name, threading.get_ident()))
            return matmul(*arguments)

        monkeypatch.setattr(backend, "matmul", watched)

    watch("triton")
    watch("eager")

    if stated == "by the argument":

        def layer(x: torch.Tensor) -> torch.Tensor:
            return fp8_linear(x, weight, scale, backend="triton").sum()
    else:

        @fp8dispatch.use_backend("triton")
        def layer(x: torch.Tensor) -> torch.Tensor:
            return fp8_linear(x, weight, scale).sum()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, x)[0]

    expected = gradient(layer(x))
    loss = checkpoint(layer, x, use_reentrant=False)
    with ThreadPoolExecutor(1) as other:
        recomputed = other.submit(gradient, loss).result()

    assert torch.equal(recomputed, expected)
    assert {name for name, _ in used} == {"triton"}, "by default a CPU takes eager"
    assert len({thread for _, thread in used}) == 2


@every_recipe
def test_training_adapters_over_frozen_weights_lowers_the_loss(recipe: Recipe, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    before = weight.view(torch.uint8).clone()
    down = torch.randn(K, 4, device=device).mul_(K**-0.5).requires_grad_()
    up = torch.zeros(4, K, device=device, requires_grad=True)
    bias = torch.zeros(N, device=device, requires_grad=True)
    x, target = torch.randn(32, K, device=device), torch.randn(32, N, device=device)
    optimizer = torch.optim.SGD([down, up, bias], lr=0.5)
    losses = []
    for _ in range(5):
        # The adapters stand before the FP8 layer, so their gradients come through its dX.
        out = fp8_linear(x + x @ down @ up, weight, scale, bias, block_size=recipe.block_size)
        loss = (out - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert all(after < before for before, after in pairwise(losses))
    assert up.grad.abs().max() > 0
    assert torch.equal(weight.view(torch.uint8), before)
