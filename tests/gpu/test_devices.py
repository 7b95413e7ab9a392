"""Kernels run on the device of their tensors, whichever device is current."""

from __future__ import annotations

import pytest
import torch

import fp8dispatch
from tests import matrix, oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("recipe", ["tensor", "row", "block128x128"])
@pytest.mark.parametrize("backend", matrix.SHIPPED)
def test_tensors_on_a_device_that_is_not_current(backend: str, recipe: str) -> None:
    assert torch.cuda.current_device() == 0
    chosen = matrix.RECIPES[recipe]
    weight, scale = oracle.make_weight(272, 1040, chosen, device="cuda:1")
    x = torch.randn(37, 1040, device="cuda:1", dtype=torch.bfloat16, requires_grad=True)
    out = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.cuda.synchronize(1)

    wide = oracle.dequantized_weight(weight, scale, chosen)
    oracle.assert_matches(out, oracle.truth(oracle.dequantized_activations(x, chosen), wide))
    oracle.assert_gradient(x.grad, grad, wide)
    assert torch.cuda.current_device() == 0


def test_a_scale_on_another_device_is_refused() -> None:
    weight, scale = fp8dispatch.quantize(torch.randn(256, 256, device="cuda:0"))
    x = torch.randn(4, 256, device="cuda:0")
    with pytest.raises(fp8dispatch.DeviceError, match="cuda:1"):
        fp8dispatch.fp8_linear(x, weight, scale.to("cuda:1"))
