"""The trainable layer of the offset codec: its product, its gradients, when its codes are made."""

from __future__ import annotations

import pytest
import torch

import fp8dispatch
from fp8dispatch import DTypeError, NumericalOverflowError, ShapeError
from fp8dispatch.offset8 import FP8Linear, dequantize_fp8, fp8_gemm, quantize_fp8

IN, OUT = 40, 24


def layer(bias: bool = False, device: str = "cpu", **options: object) -> FP8Linear:
    return FP8Linear(IN, OUT, bias, device=device, **options)  # type: ignore[arg-type]


def restored(tensor: torch.Tensor) -> torch.Tensor:
    return dequantize_fp8(*quantize_fp8(tensor), torch.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
def test_it_multiplies_codes(bias: bool, leading: tuple[int, ...], device: str) -> None:
    made = layer(bias, device)
    x = torch.randn(*leading, IN, device=device)

    y = made(x)

    assert (y.shape, y.dtype) == ((*leading, OUT), torch.float32)
    expected = fp8_gemm(x.reshape(-1, IN), made.weight.t(), output_dtype=torch.float32)
    if made.bias is not None:
        expected = expected + made.bias
    assert torch.equal(y.reshape(-1, OUT), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_keeps_the_dtype_of_x(dtype: torch.dtype) -> None:
    made = layer(True, dtype=dtype)
    y = made(torch.randn(3, IN, dtype=dtype))
    y.sum().backward()

    assert y.dtype == made.weight.dtype == made.weight.grad.dtype == made.bias.grad.dtype == dtype


def test_gradients_go_straight_through_the_rounding(device: str) -> None:
    made = layer(True, device)
    x = torch.randn(2, 3, IN, device=device, requires_grad=True)
    grad = torch.randn(2, 3, OUT, device=device)

    made(x).backward(grad)

    close = {"rtol": 1e-5, "atol": 1e-5}
    flat = grad.reshape(-1, OUT).double()
    wide_x, wide_weight = restored(x.reshape(-1, IN)).double(), restored(made.weight).double()
    torch.testing.assert_close(x.grad.double().reshape(-1, IN), flat @ wide_weight, **close)
    torch.testing.assert_close(made.weight.grad.double(), flat.t() @ wide_x, **close)
    torch.testing.assert_close(made.bias.grad.double(), flat.sum(0), **close)


def test_an_optimizer_trains_it() -> None:
    made, target = layer(), torch.randn(OUT, IN)
    optimizer = torch.optim.SGD(made.parameters(), lr=4.0)
    x = torch.randn(200, IN)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (made(x) - x @ target.t()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_codes_are_kept_until_the_weight_changes() -> None:
    made, x = layer(), torch.randn(4, IN)
    before, codes = made(x), made.weight_fp8
    assert made.weight_fp8 is codes, "made once"
    assert (codes.shape, codes.dtype, made.weight_scale.shape) == ((OUT, IN), torch.uint8, ())

    with torch.no_grad():
        made.weight.mul_(2)
    assert torch.equal(made(x), before * 2), "a counted change is noticed"
    made.weight.data.mul_(2)
    assert torch.equal(made(x), before * 2), "torch does not count a write through .data"
    made.refresh()
    assert torch.equal(made(x), before * 4)


def test_the_state_is_the_float_weight_alone() -> None:
    made = layer(True)
    made(torch.randn(1, IN))
    assert set(made.state_dict()) == {"weight", "bias"}
    other = layer(True)
    other.load_state_dict(made.state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(other(x), made(x)), "loading is a counted change"
    assert repr(made) == "FP8Linear(in_features=40, out_features=24, bias=True)"


def test_it_is_not_the_layer_of_real_fp8() -> None:
    assert fp8dispatch.FP8Linear is not FP8Linear
    assert "Not real FP8" in (FP8Linear.__doc__ or "")


def test_autocast_leaves_the_product_alone() -> None:
    made, x = layer(), torch.randn(3, IN)
    plain = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), plain)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[\.\.\., 40\]"):
        layer()(torch.randn(3, OUT))
    with pytest.raises(DTypeError, match="FP8 activations"):
        layer()(torch.randn(3, IN).to(torch.float8_e4m3fn))
    with pytest.raises(DTypeError, match="dtype"):
        layer(dtype=torch.float64)
    with pytest.raises(NumericalOverflowError):
        layer()(torch.full((1, IN), torch.nan))
    broken = layer()
    torch.nn.init.constant_(broken.weight, torch.inf)
    with pytest.raises(NumericalOverflowError):
        broken(torch.randn(1, IN))
