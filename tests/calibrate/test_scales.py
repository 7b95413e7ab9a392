"""From statistics to scales: methods, fused layers, idle experts, the cache, and seeds."""

from __future__ import annotations

import logging

import pytest
import torch

from fp8dispatch.calibrate.magnitudes import Magnitudes
from fp8dispatch.calibrate.methods import amax_by, least_error_amax
from fp8dispatch.calibrate.scales import (
    activation_scales,
    amax_seeds,
    kv_cache_scales,
    unobserved,
)
from fp8dispatch.calibrate.siblings import expert_peers, fused_groups
from fp8dispatch.calibrate.stats import CalibrationStats, KVRecord, ModuleRecord, record_of
from fp8dispatch.errors import CalibrationError, DTypeError, InvalidInputError
from tests.float8_tables import E4M3, E4M3_FNUZ, finite_codes, nearest_even


def record(x: torch.Tensor, history: tuple[float, ...] = ()) -> ModuleRecord:
    return record_of(Magnitudes.of(x), x.shape[-1], 1, history)


def stats_of(**modules: torch.Tensor) -> CalibrationStats:
    named = {name.replace("__", "."): record(x) for name, x in modules.items()}
    return CalibrationStats(modules=named)


def fp32(value: float) -> float:
    return torch.tensor(value).item()


def test_a_scale_is_amax_over_the_largest_value_of_the_format() -> None:
    stats = stats_of(a=torch.tensor([-7.0, 2.0]), b=torch.zeros(3), c=torch.full((2,), 1e-20))

    assert activation_scales(stats) == {"a": 7 / 448, "b": 1.0, "c": fp32(fp32(1e-12) / 448)}
    assert activation_scales(stats, dtype=E4M3_FNUZ)["a"] == fp32(7 / 240)
    assert list(activation_scales(stats)) == list(stats.modules), "in the model's order"


def test_methods_take_less_than_the_largest() -> None:
    torch.manual_seed(0)
    x = torch.randn(100_000)
    x[0] = 1000.0
    stats = stats_of(a=x)

    scales = {
        method: activation_scales(stats, method, percentile=99.9)["a"] * 448
        for method in ("max", "percentile", "mse")
    }

    assert scales["max"] == pytest.approx(1000)
    assert scales["percentile"] == pytest.approx(float(x.abs().quantile(0.999)), rel=1 / 16)
    assert scales["mse"] <= 1000.001
    assert activation_scales(stats.model_copy(update={"method": "percentile"}))["a"] < 0.02


def quantisation_error(x: torch.Tensor, limit: float) -> float:
    """The mean squared error with `limit` as the format's largest, by the format's own table."""
    table = finite_codes(E4M3)
    scale = fp32(limit / 448)
    codes = nearest_even((x / scale).double(), E4M3).tolist()
    restored = torch.tensor([table[code] for code in codes], dtype=torch.float64) * scale
    return float((restored - x.double()).square().mean())


@pytest.mark.parametrize("kind", ["normal", "uniform", "tails", "clipped"])
def test_least_error_is_near_the_best_of_a_search_over_the_data(kind: str) -> None:
    torch.manual_seed(3)
    x = {
        "normal": torch.randn(4000),
        "uniform": torch.rand(4000),
        "tails": torch.randn(4000) / torch.rand(4000).sqrt(),
        "clipped": torch.cat([torch.randn(4000) * 1e-4, torch.tensor([300.0])]),
    }[kind]
    magnitudes = Magnitudes.of(x)

    found = quantisation_error(x, least_error_amax(magnitudes))

    limits = [magnitudes.amax * 2 ** (-step / 16) for step in range(97)]
    best = min(quantisation_error(x, limit) for limit in limits)
    assert found <= best * 1.05
    assert found <= quantisation_error(x, magnitudes.amax) * 1.02


def test_a_percentile_among_zeros_falls_back_to_the_largest() -> None:
    x = torch.zeros(100_000)
    x[:3] = 0.5
    assert activation_scales(stats_of(a=x), "percentile")["a"] == fp32(0.5 / 448)


def test_least_error_of_zeros_is_zero() -> None:
    assert least_error_amax(Magnitudes.of(torch.zeros(3))) == 0
    assert amax_by("mse", Magnitudes()) == 0


def test_fused_layers_share_the_largest_scale() -> None:
    parts = {
        f"layers__{layer}__self_attn__{part}": torch.full((2, 4), layer * 10.0 + index + 1)
        for layer in (0, 1)
        for index, part in enumerate(("q_proj", "k_proj", "v_proj", "o_proj"))
    }
    scales = activation_scales(stats_of(**parts))

    amax = {name: round(scale * 448) for name, scale in scales.items()}
    assert [amax[f"layers.0.self_attn.{part}_proj"] for part in "qkvo"] == [3, 3, 3, 4]
    assert [amax[f"layers.1.self_attn.{part}_proj"] for part in "qkvo"] == [13, 13, 13, 14]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["m.gate_proj", "m.up_proj", "m.down_proj"], [("m.gate_proj", "m.up_proj")]),
        (["a.query", "b.key", "b.value"], [("b.key", "b.value")]),
        (["e.0.w1", "e.1.w3", "e.0.w3", "e.0.w2"], [("e.0.w1", "e.0.w3")]),
        (["q_proj", "k_proj"], [("q_proj", "k_proj")]),
        (["a.q_a_proj", "a.kv_a_proj_with_mqa"], [("a.q_a_proj", "a.kv_a_proj_with_mqa")]),
        (["a.q_proj", "a.up_proj", "fc1", "fc2"], []),
    ],
)
def test_groups_are_found_by_name(names: list[str], groups: list[tuple[str, ...]]) -> None:
    assert fused_groups(names) == groups


def test_experts_of_a_layer_are_peers() -> None:
    assert expert_peers("m.experts.3.up_proj") == expert_peers("m.experts.11.up_proj")
    assert expert_peers("m.experts.3.up_proj") != expert_peers("m.experts.3.down_proj")
    assert expert_peers("m.experts.3.up_proj") != expert_peers("n.experts.3.up_proj")
    assert expert_peers("m.shared_expert.up_proj") is None


def test_an_idle_expert_borrows_the_largest_scale_of_its_peers() -> None:
    stats = stats_of(
        m__experts__0__up_proj=torch.ones(2, 4) * 3,
        m__experts__1__up_proj=torch.empty(0, 4),
        m__experts__2__up_proj=torch.ones(2, 4) * 5,
        n__experts__0__up_proj=torch.empty(0, 4),
        idle=torch.empty(0, 4),
    )

    scales = activation_scales(stats)

    assert {name: round(scale * 448) for name, scale in scales.items()} == {
        "m.experts.0.up_proj": 3,
        "m.experts.1.up_proj": 5,
        "m.experts.2.up_proj": 5,
    }
    found = unobserved(stats)
    assert found.experts == ("m.experts.1.up_proj",)
    assert found.layers == ("n.experts.0.up_proj", "idle"), "a layer without any routed expert"


def test_clipping_of_outliers_and_spoilt_inputs_are_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.ones(100_000)
    x[0] = 1e4
    spoilt = torch.tensor([1.0, torch.nan])
    with caplog.at_level(logging.WARNING, "fp8dispatch"):
        assert activation_scales(stats_of(a=x, b=spoilt))["b"] == fp32(1 / 448)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "1 layers held NaN or infinity" in caplog.text
        caplog.clear()
        activation_scales(stats_of(a=x), "percentile", percentile=99)
    assert "clips the inputs of 1 layers to less than 1/64" in caplog.text


def test_statistics_of_an_interrupted_run_are_refused() -> None:
    stats = stats_of(a=torch.ones(2)).model_copy(update={"complete": False, "samples": 7})
    with pytest.raises(CalibrationError, match="interrupted after 7 samples"):
        activation_scales(stats)
    assert activation_scales(stats, allow_incomplete=True) == {"a": fp32(1 / 448)}


@pytest.mark.parametrize("percentile", [0, 101, -1, "99", True, float("nan")])
def test_percentiles_that_are_none_are_refused(percentile: object) -> None:
    with pytest.raises(InvalidInputError, match="above 0 and at most 100"):
        activation_scales(stats_of(a=torch.ones(2)), "percentile", percentile=percentile)  # type: ignore[arg-type]


def test_other_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="one of max, percentile, mse, found 'entropy'"):
        activation_scales(stats_of(a=torch.ones(2)), "entropy")  # type: ignore[arg-type]
    with pytest.raises(DTypeError, match="dtype"):
        activation_scales(stats_of(a=torch.ones(2)), dtype=torch.int8)
    with pytest.raises(CalibrationError, match="--no-kv-cache"):
        kv_cache_scales(stats_of(a=torch.ones(2)))


def test_the_caches_scales_are_of_the_layer_or_of_its_heads() -> None:
    cache = {"layers.0.self_attn": KVRecord(key_amax=[4.48, 0.0], value_amax=[0.1, 44.8])}
    stats = CalibrationStats(kv_cache=cache)

    whole, heads = kv_cache_scales(stats), kv_cache_scales(stats, per_head=True)

    assert whole["layers.0.self_attn"].key.tolist() == [fp32(fp32(4.48) / 448)]
    assert whole["layers.0.self_attn"].value.tolist() == [fp32(fp32(44.8) / 448)]
    assert heads["layers.0.self_attn"].key.tolist() == [fp32(fp32(4.48) / 448), 1.0]
    doubled = kv_cache_scales(stats, dtype=E4M3_FNUZ)["layers.0.self_attn"].key
    assert float(doubled) == fp32(fp32(4.48) / 240)


def test_seeds_carry_both_conventions_newest_first() -> None:
    x = torch.tensor([1.0, -8.0])
    stats = CalibrationStats(
        modules={
            "m.gate_proj": record(x, (8.0, 2.0, 4.0)),
            "m.up_proj": record(x, (8.0, 3.0, 1.0)),
            "o": record(x, (8.0, 0.5)),
            "idle": record(torch.empty(0, 2)),
        }
    )

    seeds = amax_seeds(stats, length=2)

    assert set(seeds) == {"m.gate_proj", "m.up_proj", "o"}
    assert seeds["m.gate_proj"] == seeds["m.up_proj"], "fused layers start from one window"
    assert seeds["m.up_proj"].amax_history == (4.0, 3.0)
    assert seeds["o"].amax_history == (0.5, 8.0)
    assert seeds["o"].scale == fp32(8 / 448)
    assert seeds["o"].quantization_scale == 448 / 8, "TransformerEngine's scale"
