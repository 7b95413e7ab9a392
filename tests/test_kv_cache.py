"""Keys and values in FP8 and INT8: their bytes by layer and by head, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch import (
    DeviceError,
    DTypeError,
    InvalidInputError,
    NumericalOverflowError,
    ScaleValueError,
    ShapeError,
)
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, dtype_name, max_value
from fp8dispatch.quantization.kv_cache import (
    KVCacheQuantizer,
    KVScales,
    dequantize_kv,
    kv_scale_of,
    quantize_kv,
)
from tests import oracle
from tests.float8_tables import nearest_even

B, H, T, D = 2, 3, 5, 8
PER_LAYER = torch.tensor([0.02])
PER_HEAD = torch.tensor([0.02, 0.5, 0.003])


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("scale", [PER_LAYER, PER_HEAD], ids=["layer", "head"])
@pytest.mark.parametrize("source", ACTIVATION_DTYPES, ids=dtype_name)
def test_states_are_divided_by_their_heads_scale(
    dtype: torch.dtype, scale: torch.Tensor, source: torch.dtype, device: str
) -> None:
    states = (torch.randn(B, H, T, D) * 4).to(source)
    states[0, 0, 0, 0] = 1e4  # beyond the range of every scale but the second head's

    data = quantize_kv(states.to(device), scale.to(device), dtype)
    back = dequantize_kv(data, scale.to(device), torch.float32)

    spread = scale.expand(H)[None, :, None, None]
    quotient = (states.float() / spread).double().flatten()
    codes = data.view(torch.uint8).cpu().flatten().long()
    assert torch.equal(codes, nearest_even(quotient, dtype))
    assert torch.equal(back.cpu(), data.float().cpu() * spread)
    if dtype != torch.float8_e5m2 and dtype != torch.float8_e5m2fnuz:
        assert back[0, 0, 0, 0].item() == pytest.approx(max_value(dtype) * 0.02), "it saturates"


def test_scales_by_head_keep_a_quiet_head() -> None:
    """One loud head costs the others nothing when each has its own scale."""
    states = torch.randn(B, H, 200, D) * torch.tensor([1.0, 5000.0, 0.0005])[None, :, None, None]
    amax = states.abs().amax(dim=(0, 2, 3))
    worst = {}
    for name, scale in (("layer", amax.max()[None] / 448), ("head", amax / 448)):
        back = dequantize_kv(quantize_kv(states, scale), scale, torch.float32)
        heads = zip(back.unbind(1), states.unbind(1), strict=True)
        worst[name] = min(
            float(oracle.sqnr(got.reshape(1, -1), want.reshape(1, -1))) for got, want in heads
        )
    assert worst["head"] > 31
    assert worst["layer"] < 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=dtype_name)
def test_a_value_that_is_not_finite_spoils_itself_alone(dtype: torch.dtype) -> None:
    states = torch.ones(1, 1, 1, 4)
    states[..., 1], states[..., 2] = torch.nan, torch.inf

    data = quantize_kv(states, PER_LAYER, dtype)

    back = dequantize_kv(data, PER_LAYER)
    assert back.isnan().tolist() == [[[[False, True, True, False]]]]


@pytest.mark.parametrize("scale", [PER_LAYER, PER_HEAD], ids=["layer", "head"])
@pytest.mark.parametrize("source", ACTIVATION_DTYPES, ids=dtype_name)
def test_int8_rounds_to_the_nearest_of_254_equal_steps(
    scale: torch.Tensor, source: torch.dtype, device: str
) -> None:
    states = (torch.randn(B, H, T, D) * 4).to(source)
    spread = scale.expand(H)[None, :, None, None]
    states[0, :, 0, 0] = 1e4  # beyond the range of every scale
    states[0, :, 0, 1] = -1e4
    states[1, :, 0, :2] = (spread * torch.tensor([2.5, 3.5]))[0, :, 0].to(source)

    data = quantize_kv(states.to(device), scale.to(device), torch.int8)
    back = dequantize_kv(data, scale.to(device), torch.float32)

    # Python's round goes to the even neighbour; the quotient is fp32's, as is documented.
    quotients = (states.float() / spread).flatten().tolist()
    wanted = [max(-127, min(127, round(quotient))) for quotient in quotients]
    assert data.dtype == torch.int8
    assert data.cpu().flatten().tolist() == wanted
    assert torch.equal(back.cpu(), data.float().cpu() * spread)


def test_int8_scales_reach_the_largest_value() -> None:
    amax = torch.tensor([12.7, 0.0, 1e-30])

    scale = kv_scale_of(amax, torch.int8)

    assert scale.tolist() == pytest.approx([0.1, 1.0, 1e-12 / 127])
    assert quantize_kv(torch.tensor([[[-12.7]]]), scale[:1], torch.int8).item() == -127


def test_layers_are_found_by_index_and_by_name() -> None:
    key, value = torch.randn(1, H, T, D), torch.randn(1, H, T, D)
    scales = KVScales(PER_HEAD, PER_LAYER)
    by_index = KVCacheQuantizer([KVScales(PER_LAYER, PER_LAYER), scales])
    by_name = KVCacheQuantizer({"model.layers.1.self_attn": scales})

    found = by_index.quantize(1, key, value)

    again = by_name.quantize("model.layers.1.self_attn", key, value)
    for one, other in zip(found, again, strict=True):
        assert one.dtype == torch.float8_e4m3fn
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    back = by_index.dequantize(1, *found)
    assert back[0].dtype == torch.bfloat16
    assert torch.equal(back[1], dequantize_kv(found[1], PER_LAYER))
    with pytest.raises(InvalidInputError, match=r"layer 2, found those of 0, 1; calibrate it"):
        by_index.quantize(2, key, value)


X = torch.ones(B, H, T, D)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantize_kv(X, torch.ones(4)), ShapeError, "one per head"),
        (lambda: quantize_kv(X[0, 0], torch.ones(3)), ShapeError, "one per head"),
        (lambda: quantize_kv(X, torch.ones(1).double()), DTypeError, "scale must be float32"),
        (lambda: quantize_kv(X, torch.ones(1, device="meta")), DeviceError, "found meta"),
        (lambda: quantize_kv(X.double(), PER_LAYER), DTypeError, "found float64"),
        (lambda: quantize_kv(X, PER_LAYER, torch.uint8), DTypeError, "dtype"),
        (lambda: dequantize_kv(X, PER_LAYER), DTypeError, "make it with quantize_kv"),
        (lambda: KVScales(torch.zeros(1), PER_LAYER), ScaleValueError, "key must be finite"),
        (lambda: KVScales(PER_LAYER, PER_LAYER * torch.nan), ScaleValueError, "value must be"),
        (lambda: KVScales(torch.ones(2, 2), PER_LAYER), ShapeError, r"\[heads\]"),
        (lambda: KVCacheQuantizer([PER_LAYER]), DTypeError, "must be KVScales, found Tensor"),  # type: ignore[list-item]
        (lambda: KVCacheQuantizer([], torch.uint8), DTypeError, "dtype"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, error: type[Exception], words: str) -> None:
    assert not issubclass(error, NumericalOverflowError)
    with pytest.raises(error, match=words):
        call()  # type: ignore[operator]
