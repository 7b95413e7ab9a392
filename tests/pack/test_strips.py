"""Quantising in strips: the bytes of `quantize` for every recipe, whatever the cuts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fp8dispatch
from fp8dispatch.errors import NumericalOverflowError
from fp8dispatch.formats import decode_scale
from fp8dispatch.pack import tiling as tiling_module
from fp8dispatch.pack.scheme import SCHEMES, Scheme
from fp8dispatch.pack.strips import BandQuantizer, amax_of
from fp8dispatch.pack.tiling import Tiling
from fp8dispatch.recipe import TENSOR
from tests.pack.folders import same_bytes

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")


def in_strips(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and multipliers of a weight, one band after the other."""
    tiling = Tiling.of(scheme, (weight.shape[0], weight.shape[1]))
    amax = amax_of(weight) if scheme.recipe == TENSOR else None
    quantizer = BandQuantizer(tiling, scheme)
    data, multipliers = [], []
    for top, bottom in tiling.bands():
        band = quantizer.quantize(weight[top:bottom], amax)
        data.append(band.data.clone())
        multipliers.append(band.multipliers.reshape(-1))
    scales = multipliers[0] if amax is not None else torch.cat(multipliers)
    return torch.cat([one.view(torch.uint8) for one in data]), scales


def check(weight: torch.Tensor, scheme: Scheme) -> None:
    """Strips and the whole give the same bytes, and none of them is a NaN."""
    data, multipliers = in_strips(weight, scheme)
    dtype = getattr(torch, scheme.dtype)
    whole, scale = fp8dispatch.quantize(
        weight, scheme.recipe, dtype=dtype, scale_dtype=getattr(torch, scheme.scale_dtype)
    )

    assert torch.equal(data, whole.view(torch.uint8))
    assert same_bytes(multipliers, decode_scale(scale).reshape(-1))
    assert not torch.isnan(data.view(dtype).float()).any()


@given(st.data())
def test_any_weight_gives_the_bytes_of_quantize(data: st.DataObject) -> None:
    n = data.draw(st.sampled_from([1, 2, 64, 127, 128, 129, 192, 300]))
    k = data.draw(st.sampled_from([1, 3, 32, 64, 100, 128, 200, 576, 1000]))
    scheme = SCHEMES[data.draw(st.sampled_from(list(SCHEMES)))]
    scheme = replace(scheme, dtype=data.draw(st.sampled_from(DTYPES)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(n, k, generator=generator) * data.draw(
        st.sampled_from([1e-6, 0.02, 900.0])
    )
    if data.draw(st.booleans()):
        weight[: n // 2] = 0  # rows and blocks of zeros
    if data.draw(st.booleans()):
        weight[-1, -1] = -0.0

    check(weight.to(data.draw(st.sampled_from(FLOATS))), scheme)


@pytest.mark.parametrize("name", SCHEMES)
def test_tiles_narrower_than_a_row_change_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tiling_module, "TILE_ELEMENTS", 2000)

    check(torch.randn(260, 1100).bfloat16(), SCHEMES[name])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 1e-45, 2e-38, 3.38e38, -3.38e38])
def test_extreme_weights(name: str, value: float) -> None:
    """Zeros, subnormals and the largest bf16: finite scales, no NaN."""
    weight = torch.full((130, 136), value)
    weight[3, 5] = 1.0 if value == 0 else value

    check(weight.bfloat16() if abs(value) > 1 else weight, SCHEMES[name])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (129, 135)])
def test_a_value_that_is_not_finite_is_refused(
    name: str, value: float, place: tuple[int, int]
) -> None:
    weight = torch.randn(130, 136)
    weight[place] = value

    with pytest.raises(NumericalOverflowError, match=r"finite values .* found NaN or infinity"):
        in_strips(weight, SCHEMES[name])
