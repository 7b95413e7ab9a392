"""Scales by the least squared error, against a search in float64 over a table of the codes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fp8dispatch
from fp8dispatch import InvalidInputError, PackOptions, pack_checkpoint, plan_checkpoint
from fp8dispatch.pack.report import Report
from fp8dispatch.pack.scale_search import STEPS
from fp8dispatch.pack.scheme import SCHEMES, Scheme
from fp8dispatch.pack.strips import BandQuantizer
from fp8dispatch.pack.tiling import Tiling
from tests.float8_tables import finite_codes, nearest_even
from tests.pack.folders import files_of, write_model
from tests.pack.test_plan import CONFIG, llama

if TYPE_CHECKING:
    from pathlib import Path

SEARCHED = ("channel", "block128", "group32", "group64", "group128")


def searched(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K], and a scale for every value [N, K]."""
    shape = (weight.shape[0], weight.shape[1])
    tiling = Tiling.of(scheme, shape)
    quantizer = BandQuantizer(tiling, scheme, scales="mse")
    codes, scales = [], []
    for top, bottom in tiling.bands():
        band = quantizer.quantize(weight[top:bottom])
        codes.append(band.data.clone())
        rows = band.multipliers.expand(bottom - top, -1)
        scales.append(rows.repeat_interleave(tiling.columns, 1)[:, : shape[1]])
    return torch.cat([one.view(torch.uint8) for one in codes]), torch.cat(scales)


def error_of(
    weight: torch.Tensor, scale: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> torch.Tensor:
    """Squared error of each block in float64, codes looked up in the format's table."""
    table = torch.zeros(256, dtype=torch.float64)
    for code, value in finite_codes(dtype).items():
        table[code] = value
    wide, spread = weight.double(), scale.double()
    restored = table[nearest_even((wide / spread).flatten(), dtype)].view_as(wide) * spread
    n, k = weight.shape
    rows, columns = scheme.recipe.block_size or (1, k)
    padded = torch.zeros(-(-n // rows) * rows, -(-k // columns) * columns, dtype=torch.float64)
    padded[:n, :k] = (wide - restored).square()
    return padded.view(len(padded) // rows, rows, -1, columns).sum((1, 3))


@given(st.data())
def test_no_candidate_is_better_and_the_codes_are_those_of_the_scale(data: st.DataObject) -> None:
    n = data.draw(st.sampled_from([1, 3, 128, 130]))
    k = data.draw(st.sampled_from([1, 32, 100, 128, 300]))
    name = data.draw(st.sampled_from(SEARCHED))
    dtype = data.draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e4m3fnuz]))
    scheme = replace(SCHEMES[name], dtype=str(dtype).removeprefix("torch."))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    size = data.draw(st.sampled_from([1e-6, 0.02, 1e30]))
    weight = (torch.randn(n, k, generator=generator) * size).bfloat16()
    if data.draw(st.booleans()):
        weight[: n // 2] = 0

    codes, scale = searched(weight, scheme)

    expected = (weight.float() / scale).double().flatten()
    assert torch.equal(codes.flatten().long(), nearest_even(expected, dtype))
    _, usual = fp8dispatch.quantize(weight, scheme.recipe, dtype=dtype)
    rows, columns = scheme.recipe.block_size or (1, k)
    usual = usual.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    found = error_of(weight, scale, scheme, dtype)
    best = torch.stack([error_of(weight, usual * step, scheme, dtype) for step in STEPS]).amin(0)
    assert bool((found <= best * (1 + 1e-4)).all()), "sums in fp32 may prefer an equally good one"
    assert bool((scale >= usual).all() and (scale < 2 * usual).all())
    assert bool((scale == 1)[(weight == 0).all(1)].all()) or name == "block128"


@pytest.mark.parametrize(
    ("name", "gain"), [("block128", 0.02), ("channel", 0.3), ("group128", 0.6), ("group32", 1.2)]
)
def test_it_gains_more_the_smaller_the_blocks(name: str, gain: float) -> None:
    weight = torch.randn(512, 768, generator=torch.Generator().manual_seed(0)) * 0.02
    scheme = SCHEMES[name]
    data, scale = fp8dispatch.quantize(weight, scheme.recipe)
    usual = fp8dispatch.dequantize(
        data, scale, block_size=scheme.recipe.block_size, dtype=torch.float32
    )
    codes, scales = searched(weight, scheme)

    better = codes.view(torch.float8_e4m3fn).float() * scales

    noise = [(one - weight).double().square().sum() for one in (usual, better)]
    assert 10 * torch.log10(noise[0] / noise[1]) > gain


def test_the_plan_the_report_and_the_files_say_so(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", llama(layers=1), CONFIG)
    options = PackOptions(recipe="group32", layout="native", scales="mse")

    done = pack_checkpoint(source, tmp_path / "out", options)
    usual = pack_checkpoint(source, tmp_path / "usual", replace(options, scales="amax"))

    assert done.summary().plan.scales == "mse" and usual.summary().plan.scales == "amax"
    stored = json.loads((tmp_path / "out" / "fp8_report.json").read_text())
    assert Report.model_validate(stored).scales == stored["scales"] == "mse"
    assert "least squared error" in (tmp_path / "out" / "fp8_report.md").read_text()
    assert done.report is not None and usual.report is not None
    assert (done.report.totals.sqnr_db or 0) > (usual.report.totals.sqnr_db or 99) + 1
    assert fp8dispatch.verify(tmp_path / "out", against=source).ok


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_no_byte(tmp_path: Path, workers: int) -> None:
    source = write_model(tmp_path / "in", llama(layers=1), CONFIG)
    for out, threads in (("one", 1), ("other", workers)):
        pack_checkpoint(
            source, tmp_path / out, PackOptions(scales="mse"), workers=threads, report=False
        )

    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


@pytest.mark.parametrize("recipe", ["tensor-static", "mxfp8", "block128-ue8m0"])
def test_where_nothing_can_be_chosen_it_is_refused(tmp_path: Path, recipe: str) -> None:
    source = write_model(tmp_path / "in", llama(layers=1), CONFIG)

    with pytest.raises(InvalidInputError, match=r"scales mse needs fp32 scales per channel, .*fou"):
        plan_checkpoint(source, PackOptions(recipe=recipe, scales="mse"))
    with pytest.raises(InvalidInputError, match="scales must be one of amax, mse, found 'best'"):
        plan_checkpoint(source, PackOptions(scales="best"))
