"""dX through the dequantised weight on the GPU: every way, and what is chosen."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch import dequantized_grad
from fp8dispatch.dequantized_grad import Way
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.prepare import weight_scale_fp32
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
BY_GLUON = ("tensor", "row", "block-128x128", "block-64x128")
"""The others go another way, or raise where this one is named."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("way", [*Way, None])
def test_every_way(way: Way | None, name: str, dtype: torch.dtype) -> None:
    if way is Way.GLUON and not dequantized_grad.runs_gluon(torch.device("cuda", 0)):
        pytest.skip("needs a Hopper GPU and a Triton that the Gluon kernel has run with before")
    recipe = RECIPES[name]
    for m, n, k in SIZES:
        weight, scale = oracle.make_weight(n, k, recipe, device="cuda")
        fp32 = weight_scale_fp32(scale, recipe, n, k)
        grad = torch.randn(m, n, device="cuda").to(dtype)

        if way is Way.GLUON and name not in BY_GLUON and min(n, k) > 128:
            with pytest.raises(BackendUnavailableError, match="blocks of multiples of 64x128"):
                dequantized_grad.grad_input(grad, weight, fp32, recipe, way)
            continue
        if way is Way.GLUON and name not in BY_GLUON:
            continue  # one block or group may be all there is
        got = dequantized_grad.grad_input(grad, weight, fp32, recipe, way)

        assert (got.shape, got.dtype) == ((m, k), dtype)
        wide = oracle.dequantized_weight(weight, scale, recipe)
        oracle.assert_gradient(got, grad, wide, label=f"{way} {m}x{n}x{k}")
        again = dequantized_grad.grad_input(grad, weight, fp32, recipe, way)
        assert torch.equal(got, again), "sums have a fixed order"
