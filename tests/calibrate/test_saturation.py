"""The saturation watch: which layers it names, and what it tells the user to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8dispatch.calibrate.magnitudes import Magnitudes
from fp8dispatch.calibrate.output_error import compare_output_error, output_errors
from fp8dispatch.calibrate.saturation import findings, saturation, sensitive_layers
from fp8dispatch.calibrate.stats import CalibrationStats, ModuleRecord, record_of
from fp8dispatch.errors import DTypeError, ScaleValueError, ShapeError


def with_outlier(ratio: float, history: tuple[float, ...] = (1.0,)) -> ModuleRecord:
    """Inputs whose largest is `ratio` times all the others."""
    x = torch.ones(100_000)
    x[0] = ratio
    return record_of(Magnitudes.of(x), 8, 1, history)


def stats_of(**modules: ModuleRecord) -> CalibrationStats:
    return CalibrationStats(modules={n.replace("__", "."): r for n, r in modules.items()})


@pytest.mark.parametrize(
    ("ratio", "level", "proposal"),
    [
        (1, "fine", ""),
        (60, "fine", ""),
        (70, "outliers", "one scale per token"),
        (900, "outliers", "group"),
        (1100, "sensitive", "--skip"),
    ],
)
def test_the_ratio_decides(ratio: float, level: str, proposal: str) -> None:
    (row,) = saturation(stats_of(a=with_outlier(ratio)))

    assert row.level == level
    assert proposal in row.proposal
    assert bool(proposal) == bool(row.proposal)
    assert row.ratio == pytest.approx(ratio, rel=1 / 16)
    assert (row.amax, row.name) == (max(ratio, 1), "a")
    assert row.p99 <= row.p99_9 <= row.p99_99 <= row.amax


def test_rows_are_sorted_and_the_sensitive_are_listed() -> None:
    stats = stats_of(a=with_outlier(3), b=with_outlier(5000), c=with_outlier(2000))

    assert [row.name for row in saturation(stats)] == ["b", "c", "a"]
    assert sensitive_layers(stats) == ("b", "c")


def test_shares_that_are_clipped_and_lost() -> None:
    x = torch.cat([torch.full((9000,), 1e-6), torch.ones(989), torch.full((11,), 448.0)])
    record = record_of(Magnitudes.of(x), 1, 1)
    (row,) = saturation(stats_of(a=record).model_copy(update={"percentile": 99.89}))

    assert row.underflow == pytest.approx(0.9), "1e-6 is below 2 ** -9 with the scale 1"
    assert row.clipped == pytest.approx(0.0011, abs=2e-4)


def test_inputs_that_are_mostly_zeros_have_no_finite_ratio() -> None:
    x = torch.zeros(100_000)
    x[0] = 2.0
    (row,) = saturation(stats_of(a=record_of(Magnitudes.of(x), 1, 1)))
    assert (row.ratio, row.level) == (float("inf"), "sensitive")
    (row,) = saturation(stats_of(a=record_of(Magnitudes.of(torch.zeros(3)), 1, 1)))
    assert (row.ratio, row.level) == (1.0, "fine")


def test_findings_name_the_layer_and_the_remedy() -> None:
    spoilt = record_of(Magnitudes.of(torch.tensor([1.0, torch.inf])), 2, 1)
    padded = record_of(Magnitudes.of(torch.ones(2)), 2, 5, unmasked_calls=4)
    stats = stats_of(
        outlier=with_outlier(5000),
        spoilt=spoilt,
        padded=padded,
        spiky=with_outlier(20, history=(1.0, 1.0, 20.0)),
        m__experts__0__up_proj=with_outlier(2),
        m__experts__1__up_proj=record_of(Magnitudes(), 8, 0),
        idle=record_of(Magnitudes(), 8, 0),
    )

    found = findings(stats)

    for start, remedy in [
        ("outlier: the largest input is 5000", "--skip"),
        ("spoilt: 1 inputs were NaN or infinite", "wider dtype"),
        ("padded: padding could not be told from tokens in 4 of 5 calls", "batch size of 1"),
        ("spiky: one call has 20 times", "more samples"),
        ("1 expert layers were never routed to (m.experts.1.up_proj)", "more samples"),
        ("1 layers were never called (idle)", "dynamic activations"),
    ]:
        (sentence,) = (text for text in found if text.startswith(start))
        assert remedy in sentence
        assert "\n" not in sentence
    assert len(found) == 6
    assert findings(stats_of(a=with_outlier(2))) == []


def test_the_output_says_whether_clipping_an_outlier_is_worth_it() -> None:
    """The outlier carries the output here, and is worth nothing there."""
    x = torch.randn(64, 16)
    x[0, 0] = 1e6
    layer = nn.Linear(16, 8, bias=False)
    carries, idle = torch.randn(8, 16), torch.randn(8, 16)
    idle[:, 0] = 0
    scales = {"max": 1e6 / 448, "percentile": 4 / 448}

    layer.weight.data = carries
    found = compare_output_error(layer, x, scales)
    assert list(found) == ["max", "percentile", "dynamic"]
    assert found["percentile"].total > 0.9 > 0.1 > found["max"].total
    assert found["max"].median_token > 0.9, "the other tokens are lost, which the total hides"
    assert found["percentile"].median_token < 0.05
    assert max(found["dynamic"].total, found["dynamic"].median_token) < 0.05
    layer.weight.data = idle
    found = compare_output_error(layer, x, scales)
    assert found["percentile"].total < 0.05 < 0.9 < found["max"].total
    assert found["dynamic"].total > found["percentile"].total, "the loud token loses the others"


def test_errors_are_measured_on_the_layers_with_outliers_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.ones(1, 4, 8)
    names = {"0": with_outlier(500), "1": with_outlier(2)}
    stats = CalibrationStats(modules=names)

    found = output_errors(model, stats, lambda: model(x))

    assert set(found) == {"0"}
    assert set(found["0"]) == {"max", "percentile", "dynamic"}
    assert not model[0]._forward_pre_hooks


def test_what_does_not_fit_is_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(DTypeError, match="found ReLU"):
        compare_output_error(nn.ReLU(), torch.ones(1, 4), {})  # type: ignore[arg-type]
    with pytest.raises(ScaleValueError):
        compare_output_error(layer, torch.ones(1, 4), {"zero": 0.0})
    with pytest.raises(ShapeError):
        compare_output_error(layer, torch.ones(()), {})
