"""The figures of a weight, against float64 on the restored values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import fp8dispatch
from fp8dispatch.pack.decoding import decode_into
from fp8dispatch.pack.figures import BandMeter, Sums, TensorFigures
from fp8dispatch.pack.scheme import SCHEMES, Scheme
from fp8dispatch.pack.strips import BandQuantizer, amax_of
from fp8dispatch.pack.tiling import Tiling
from fp8dispatch.recipe import TENSOR


def measured(weight: torch.Tensor, scheme: Scheme) -> TensorFigures:
    shape = (weight.shape[0], weight.shape[1])
    tiling = Tiling.of(scheme, shape)
    amax = amax_of(weight) if scheme.recipe == TENSOR else None
    quantizer = BandQuantizer(tiling, scheme, keep=True)
    meter, sums = BandMeter(tiling, scheme), Sums()
    for top, bottom in tiling.bands():
        band = quantizer.quantize(weight[top:bottom], amax)
        sums.merge(meter.measure(band, top))
    return sums.figures("w", shape, str(scheme))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e4m3fnuz"])
@pytest.mark.parametrize("size", [1e-10, 0.02, 1e36])
@pytest.mark.parametrize("name", SCHEMES)
def test_figures_are_those_of_the_restored_weight(name: str, size: float, dtype: str) -> None:
    scheme = replace(SCHEMES[name], dtype=dtype)
    weight = (torch.randn(300, 500) * size).bfloat16()
    weight[:, :130] = 0
    weight[7, 400] = 60 * size
    data, scale = fp8dispatch.quantize(
        weight,
        scheme.recipe,
        dtype=getattr(torch, dtype),
        scale_dtype=getattr(torch, scheme.scale_dtype),
    )
    restored = fp8dispatch.dequantize(
        data, scale, block_size=scheme.recipe.block_size, dtype=torch.float32
    ).double()
    truth = weight.double()
    error = truth - restored

    found = measured(weight, scheme)

    sqnr = 10 * math.log10(float(truth.square().sum() / error.square().sum()))
    assert found.sqnr_db == pytest.approx(sqnr, abs=1e-3)
    assert found.cosine == pytest.approx(
        float((truth * restored).sum() / truth.norm() / restored.norm()), abs=3e-5
    )
    assert found.relative_error == pytest.approx(float(error.norm() / truth.norm()), rel=1e-4)
    assert found.max_abs_error == pytest.approx(float(error.abs().max()), rel=1e-5)
    assert found.amax == float(truth.abs().max())
    assert found.flushed == float(((truth != 0) & (restored == 0)).double().mean())
    assert found.clipped == 0
    assert found.p999 == pytest.approx(float(truth.abs().quantile(0.999)), rel=0.02)
    assert found.saturation_ratio == pytest.approx(found.amax / found.p999)


def test_blocks_of_zeros_are_counted_once() -> None:
    weight = torch.randn(300, 500)
    weight[128:256, 256:384] = 0

    assert measured(weight, SCHEMES["block128"]).zero_blocks == 1
    assert measured(weight, SCHEMES["group128"]).zero_blocks == 128
    assert measured(weight * 0, SCHEMES["tensor-static"]).zero_blocks == 1


def test_a_weight_without_loss_has_no_noise_and_zeros_have_no_cosine() -> None:
    exact, zeros = (measured(torch.full((4, 64), value), SCHEMES["channel"]) for value in (448, 0))

    assert (exact.sqnr_db, exact.relative_error, exact.cosine) == (None, 0, pytest.approx(1))
    assert (zeros.sqnr_db, zeros.cosine, zeros.saturation_ratio) == (None, None, None)


@pytest.mark.parametrize("k", [500, 512, 4096])
@pytest.mark.parametrize("share", [0.001, 0.4])
def test_values_that_become_zero_are_counted_wherever_they_are(k: int, share: float) -> None:
    weight = torch.randn(64, k)
    weight[torch.rand(64, k) < share] = 0  # was zero before
    tiny = torch.rand(64, k) < share
    weight[tiny] *= 1e-7
    scheme = SCHEMES["channel"]
    data, _ = fp8dispatch.quantize(weight, scheme.recipe)

    flushed = float(((weight != 0) & (data.float() == 0)).double().mean())

    assert flushed > share / 2
    assert measured(weight, scheme).flushed == flushed


def test_a_weight_that_is_lost_whole_has_no_cosine() -> None:
    """Scales have a floor: what lies far below it becomes zero."""
    found = measured(torch.full((4, 64), -1e-18), SCHEMES["channel"])

    assert (found.flushed, found.cosine, found.relative_error) == (1, None, 1)
    assert found.sqnr_db == pytest.approx(0)


def test_a_weight_that_is_nearly_lost_keeps_the_digits_of_its_cosine() -> None:
    """One value of many survives, so that differences of large sums would say nothing of it."""
    weight = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) * 1e-18
    weight[300, 77] = 3e-18
    scheme = SCHEMES["block128"]
    data, scale = fp8dispatch.quantize(weight, scheme.recipe)
    restored = fp8dispatch.dequantize(data, scale, block_size=(128, 128), dtype=torch.float32)

    truth, kept = weight.double(), restored.double()

    assert int((kept != 0).sum()) == 1
    wanted = float((truth * kept).sum() / truth.norm() / kept.norm())
    assert measured(weight, scheme).cosine == pytest.approx(wanted, rel=1e-5)


def test_scales_that_were_rounded_down_clip_and_are_counted() -> None:
    scheme = replace(SCHEMES["channel"], scale_dtype="bfloat16")
    weight = torch.full((1, 64), 448 * 1.003)  # its scale, 1.003, is 1 in bf16

    assert measured(weight, scheme).clipped == 64


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_every_code_decodes_as_torch_decodes_it(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = torch.empty(256)
    factor = decode_into(codes, torch.empty(256, dtype=torch.int16), values)
    finite = ~torch.isnan(codes.float())

    assert int(finite.sum()) >= 254
    assert torch.equal((values * factor)[finite], codes.float()[finite])
