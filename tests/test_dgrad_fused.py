"""The fused linears take dY through an FP8 GEMM as well, where that is stated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fp8dispatch import BackendUnavailableError, rms_norm_linear, silu_mul_linear, use_backend
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.recipe import ROW, Recipe
from tests import fp8_gradients, oracle
from tests.fp8_gradients import every_recipe
from tests.oracle import RECIPES, name_of
from tests.test_fused_linear import DECIBELS, EPS, K, N, assert_close, gated, leaf, norm, wide

inputs = pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=name_of)


def gradients(
    call: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    with use_backend(dgrad="fp8"):
        out = call()
    return torch.autograd.grad(out, leaves, grad)


@inputs
@every_recipe
def test_norm(recipe: Recipe, dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    x, residual = (leaf(7, K, dtype=dtype, device=device) for _ in range(2))
    gain, bias = leaf(K, device=device), leaf(N, device=device)
    grad = torch.randn(7, N, device=device).to(dtype)

    got = gradients(
        lambda: rms_norm_linear(
            x, gain, EPS, weight, scale, bias, residual=residual, block_size=recipe.block_size
        )[0],
        (x, residual, gain, bias),
        grad,
    )

    of_hidden = fp8_gradients.truth(grad, weight, scale, recipe).value.float()
    leaves = wide(x), wide(residual), wide(gain)
    wanted = torch.autograd.grad(norm(leaves[0] + leaves[1], leaves[2]), leaves, of_hidden)
    for found, expected in zip(got[:3], wanted, strict=True):
        assert_close(found, expected, min(DECIBELS[dtype], 60))
    assert torch.equal(got[3], grad.sum(0, dtype=torch.float32))


@inputs
@every_recipe
def test_gate(recipe: Recipe, dtype: torch.dtype, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    gate, up = (leaf(2, 3, K, dtype=dtype, device=device) for _ in range(2))
    grad = torch.randn(2, 3, N, device=device).to(dtype)

    got = gradients(
        lambda: silu_mul_linear(gate, up, weight, scale, block_size=recipe.block_size),
        (gate, up),
        grad,
    )

    of_hidden = fp8_gradients.truth(grad, weight, scale, recipe).value.float()
    leaves = wide(gate), wide(up)
    wanted = torch.autograd.grad(gated(*leaves), leaves, of_hidden.view(2, 3, K))
    for found, expected in zip(got, wanted, strict=True):
        assert_close(found, expected, min(DECIBELS[dtype], 60))


def test_func_grad(device: str) -> None:
    weight, scale = oracle.make_weight(N, K, ROW, device=device)
    gate, up = leaf(3, K, device=device), leaf(3, K, device=device)

    def loss(gate: torch.Tensor) -> torch.Tensor:
        return silu_mul_linear(gate, up.detach(), weight, scale).square().sum()

    with use_backend(dgrad="fp8"):
        got = torch.func.grad(loss)(gate.detach())
        (wanted,) = torch.autograd.grad(loss(gate), gate)

    assert torch.equal(got, wanted)


def test_groups_are_refused_before_anything_runs(device: str) -> None:
    weight, scale = oracle.make_weight(N, K, RECIPES["block-1x32"], device=device)
    x, gain = leaf(3, K, device=device), leaf(K, device=device)
    with use_backend(dgrad="fp8"):
        with pytest.raises(BackendUnavailableError, match="found groups"):
            rms_norm_linear(x.detach(), gain, EPS, weight, scale)
        with pytest.raises(BackendUnavailableError, match="found groups"):
            silu_mul_linear(x, x, weight, scale)
        bias = leaf(N, device=device)
        silu_mul_linear(x.detach(), x.detach(), weight, scale, bias).sum().backward()
        with torch.no_grad():
            silu_mul_linear(x, x, weight, scale)
    assert bias.grad is not None
