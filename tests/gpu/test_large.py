"""Tensors of more than 2**31 elements: offsets are 64-bit in every kernel."""

from __future__ import annotations

import pytest
import torch

import fp8dispatch
from fp8dispatch.recipe import BLOCK_128, ROW, Recipe
from tests import matrix, oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("large"),  # one after the other: each takes tens of gigabytes
    pytest.mark.unpoisoned,  # filling gigabytes with NaN is not what is tested
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 60e9,
        reason="needs 60 GB of GPU memory",
    ),
]

recipes = pytest.mark.parametrize("recipe", [ROW, BLOCK_128], ids=str)
backends = pytest.mark.parametrize("backend", [n for n in matrix.SHIPPED if n != "eager"])


@pytest.mark.parametrize(
    ("m", "n", "k"), [(270_000, 32, 8192), (66_000, 33_024, 128)], ids=["activations", "outputs"]
)
@recipes
@backends
def test_rows_beyond_two_to_the_31(backend: str, recipe: Recipe, m: int, n: int, k: int) -> None:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight, scale = oracle.make_weight(n, k, recipe, device="cuda")
    out = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
    for rows in (slice(0, 8), slice(m - 8, m)):
        wide_x = oracle.dequantized_activations(x[rows], recipe)
        wide_weight = oracle.dequantized_weight(weight, scale, recipe)
        oracle.assert_matches(out[rows], oracle.truth(wide_x, wide_weight))


@recipes
@backends
def test_weights_beyond_two_to_the_31(backend: str, recipe: Recipe) -> None:
    m, n, k = 4, 270_336, 8192
    part, part_scale = oracle.make_weight(n // 16, k, recipe, device="cuda")
    weight = part.view(torch.uint8).repeat(16, 1).view(part.dtype)
    scale = part_scale.repeat(16, 1) * torch.linspace(
        0.5, 2, 16 * part_scale.shape[0], device="cuda"
    ).unsqueeze(-1)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
    last = slice(n - n // 16, n)
    wide_last = oracle.dequantized_weight(weight[last], scale[-part_scale.shape[0] :], recipe)
    wide_x = oracle.dequantized_activations(x, recipe)
    oracle.assert_matches(out[:, last], oracle.truth(wide_x, wide_last))

    grad = torch.zeros_like(out)
    grad[:, last] = torch.randn(m, n // 16, device="cuda", dtype=out.dtype)
    out.backward(grad)
    oracle.assert_gradient(x.grad, grad[:, last], wide_last)
