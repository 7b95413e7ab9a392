"""dX through the dequantised weight on the GPU: every way, and what is chosen."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch import dequantized_grad
from fp8dispatch.dequantized_grad import Way
from fp8dispatch.kernels.requirements import refuse_gluon
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.probes.device import describe
from tests import oracle
from tests.oracle import RECIPES, name_of

pytestmark = pytest.mark.gpu

SIZES = (
    (1, 8, 16),
    (16, 4096, 2048),
    (33, 264, 272),
    (64, 1536, 7168),
    (100, 520, 1040),
    (130, 2112, 7168),
    (257, 24576, 1536),
    (1030, 640, 2880),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("way", [*Way, None])
def test_every_way(way: Way | None, recipe: oracle.Recipe, dtype: torch.dtype) -> None:
    if way is Way.GLUON and (reasons := refuse_gluon(describe(torch.device("cuda", 0)))):
        pytest.skip("; ".join(map(str, reasons)))
    for m, n, k in SIZES:
        weight, scale = oracle.make_weight(n, k, recipe, device="cuda")
        fp32 = weight_scale_fp32(scale, recipe, n, k)
        grad = torch.randn(m, n, device="cuda").to(dtype)

        got = dequantized_grad.grad_input(grad, weight, fp32, recipe, way)

        assert (got.shape, got.dtype) == ((m, k), dtype)
        wide = oracle.dequantized_weight(weight, scale, recipe)
        oracle.assert_gradient(got, grad, wide, label=f"{way} {m}x{n}x{k}")
        again = dequantized_grad.grad_input(grad, weight, fp32, recipe, way)
        assert torch.equal(got, again), "sums have a fixed order"
