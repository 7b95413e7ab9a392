"""Targets over planted results: reached, missed beyond noise, or not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import targets
from bench.ratios import Ratio, collect, each_at_least, mean_at_least
from bench.suites import SUITES
from bench.targets import HELD_BY_TESTS, TARGETS, Target
from tests.bench.results import CEILINGS, figures, linear_row, result

BLOCK = "block 128x128"


def outcome(name: str, threshold: str, tmp_path: Path, content: dict[str, Any]) -> str:
    """The state of one target over one planted result."""
    (target,) = [one for one in TARGETS if one.name == name and one.threshold.startswith(threshold)]
    (tmp_path / f"h200-{target.suite}.json").write_text(json.dumps(content))
    return targets.judge(target, tmp_path, "h200")[0]


def gemm(us: dict[str, float], spread: float = 0.0, m: int = 4096) -> dict[str, Any]:
    row = {"recipe": BLOCK, "m": m, "n": 4096, "k": 7168, **figures(us, spread)}
    return result("gemm", [CEILINGS, row])


def test_every_target_has_a_suite_and_says_what_it_asks() -> None:
    assert {target.suite for target in TARGETS if "." not in target.suite} <= set(SUITES)
    assert all((targets.RESULTS.parent.parent / path).exists() for path in HELD_BY_TESTS.values())
    assert all(target.name and target.formula and target.threshold for target in TARGETS)
    assert len({(one.name, one.formula, one.threshold) for one in TARGETS}) == len(TARGETS)


@pytest.mark.parametrize(
    ("name", "text", "state"),
    [
        ("GPU suite", "1616 passed, 50 skipped in 115.21s", "reached"),
        ("GPU suite", "1 failed, 1615 passed", "MISSED"),
        ("GPU suite", "", "MISSED"),
        (
            "memcheck of the Triton kernels",
            "90 calls, numbers right\nERROR SUMMARY: 0 errors",
            "reached",
        ),
        ("memcheck of the Triton kernels", "ERROR SUMMARY: 0 errors", "MISSED"),
        (
            "memcheck of the Triton kernels",
            "numbers right\nERROR SUMMARY: 0 errors\nnumbers right\nERROR SUMMARY: 3 errors",
            "MISSED",
        ),
        (
            "racecheck of the Hopper kernels",
            "numbers right\nRACECHECK SUMMARY: 0 hazards displayed (0 errors)",
            "reached",
        ),
    ],
)
def test_logs(name: str, text: str, state: str, tmp_path: Path) -> None:
    (target,) = [one for one in TARGETS if one.name == name]
    (tmp_path / f"h200-{target.suite}").write_text(text)

    assert targets.judge(target, tmp_path, "h200")[0] == state


MEASURED = [target for target in TARGETS if "." not in target.suite]


@pytest.mark.parametrize(
    "target", MEASURED, ids=lambda target: f"{target.name}, {target.threshold}"
)
def test_without_a_file_or_without_points_nothing_is_measured(
    target: Target, tmp_path: Path
) -> None:
    assert targets.judge(target, tmp_path, "h200") == (
        "not measured",
        f"no h200-{target.suite}.json",
    )
    failed: list[dict[str, Any]] = (
        []
        if target.suite == "numerics"
        else [{"label": "point", "failed": "RuntimeError: planted"}]
    )
    more = {"first result, seconds": []} if target.suite == "coldstart" else {}
    content = result(target.suite, failed, **more)
    (tmp_path / f"h200-{target.suite}.json").write_text(json.dumps(content))
    assert targets.judge(target, tmp_path, "h200")[0] == "not measured"
    content["rehearsal"] = True
    (tmp_path / f"h200-{target.suite}.json").write_text(json.dumps(content))
    assert "rehearsal" in targets.judge(target, tmp_path, "h200")[1]


@pytest.mark.parametrize(
    ("us", "spread", "state"),
    [
        ({"gluon": 100.0, "deepgemm": 93.5}, 0.0, "reached"),
        ({"gluon": 100.0, "deepgemm": 92.0}, 0.0, "MISSED"),
        ({"gluon": 100.0, "deepgemm": 92.0}, 2.0, "reached"),  # within the noise of both
        ({"gluon": 100.0}, 0.0, "not measured"),
        ({"deepgemm": 100.0}, 0.0, "not measured"),
    ],
)
def test_each_point_counts_beyond_noise(
    us: dict[str, float], spread: float, state: str, tmp_path: Path
) -> None:
    assert outcome("block GEMM against DeepGEMM", ">= 0.93", tmp_path, gemm(us, spread)) == state


def test_a_mean_is_geometric_and_of_the_rows_that_are_meant(tmp_path: Path) -> None:
    name = "block GEMM against DeepGEMM"
    half_and_double = gemm({"gluon": 100.0, "deepgemm": 200.0})
    half_and_double["gemm"] += gemm({"gluon": 100.0, "deepgemm": 51.0})["gemm"]
    assert outcome(name, ">= 1.00", tmp_path, half_and_double) == "reached"
    other_rows = gemm({"gluon": 100.0, "deepgemm": 50.0}, m=64)
    assert outcome(name, ">= 1.00", tmp_path, other_rows) == "not measured"
    other_recipe = gemm({"gluon": 100.0, "deepgemm": 50.0})
    other_recipe["gemm"][1]["recipe"] = "row"
    assert outcome(name, ">= 1.00", tmp_path, other_recipe) == "not measured"


def test_the_whole_linear_is_against_the_best_at_each_point(tmp_path: Path) -> None:
    us = {"automatic": 10.0, "gluon": 10.0, "deepgemm": 20.0, "bf16": 14.5, "fbgemm_tile": 30.0}
    rows = [CEILINGS, linear_row(16, 4096, 7168, us)]
    name = "whole linear, blocks, few rows"
    assert outcome(name, ">= 1.4", tmp_path, result("linear", rows)) == "reached"
    rows[1]["eager"]["us"]["fbgemm_tile"] = 13.9
    assert outcome(name, ">= 1.4", tmp_path, result("linear", rows)) == "MISSED"
    rows[1]["accuracy"] = "fast"
    assert outcome(name, ">= 1.4", tmp_path, result("linear", rows)) == "not measured"


def test_without_other_libraries_it_is_what_would_be_chosen_then(tmp_path: Path) -> None:
    us = {"automatic": 10.0, "deepgemm": 10.0, "gluon": 15.0, "bf16": 20.0}
    rows = [linear_row(16, 4096, 7168, us)]
    name = "whole linear, blocks, few rows, no other library"
    assert outcome(name, ">= 1.35", tmp_path, result("linear", rows)) == "MISSED"
    rows[0]["eager"]["us"]["gluon"] = 7.0
    assert outcome(name, ">= 1.35", tmp_path, result("linear", rows)) == "reached"


@pytest.mark.parametrize(
    ("automatic", "bf16", "state"),
    [(14.9, 15.0, "reached"), (16.0, 20.0, "MISSED"), (18.0, 25.0, "reached")],
)
def test_host_bound_calls(automatic: float, bf16: float, state: str, tmp_path: Path) -> None:
    us = {"automatic": automatic, "gluon": automatic, "bf16": bf16}
    content = result("linear", [linear_row(16, 4096, 7168, us)])
    assert outcome("whole linear, host-bound", "<= 15", tmp_path, content) == state


def test_points_where_the_choice_is_late(tmp_path: Path) -> None:
    us = {"automatic": 10.0, "gluon": 10.0, "bf16": 20.0}
    late = us | {"automatic": 13.0}
    rows = [linear_row(16, 4096, 7168, us)]
    assert outcome("automatic choice", "none", tmp_path, result("linear", rows)) == "reached"
    rows.append(linear_row(64, 4096, 7168, late))
    assert outcome("automatic choice", "none", tmp_path, result("linear", rows)) == "MISSED"


def test_decode_is_judged_cold_and_on_its_five_weights(tmp_path: Path) -> None:
    def row(n: int, k: int, ours: float) -> dict[str, Any]:
        cold = figures({"gluon": ours, "deepgemm": 12.0, "read": 8.0})
        warm = figures({"gluon": 99.0, "deepgemm": 1.0})
        return {"recipe": BLOCK, "m": 16, "n": n, "k": k, "cold": cold, "warm": warm}

    peer = "decode against the best block-scaled peer"
    content = result("decode", [row(4096, 7168, 10.0), row(8192, 8192, 1000.0)])
    assert outcome(peer, ">= 1.10", tmp_path, content) == "reached"
    reading = "decode against reading"
    content = result("decode", [row(7168, 2048, 50.0), row(4096, 7168, 9.9)])
    assert outcome(reading, "within", tmp_path, content) == "reached"  # the first is under 25 MB
    content = result("decode", [row(4096, 7168, 10.1)])
    assert outcome(reading, "within", tmp_path, content) == "MISSED"


def test_quantisation_compilation_gradient_and_host(tmp_path: Path) -> None:
    def plain(us: float, m: int) -> dict[str, Any]:
        part = {"part": "plain", "m": m, "k": 7168}
        return part | figures({"group 128": us, "token": 10.0, "copy": 10.0})

    name = "activation quantisation"
    content = result("quantise", [plain(50.0, 256), plain(10.4, 1024)])
    assert outcome(name, ">= 0.95", tmp_path, content) == "reached"
    content = result("quantise", [plain(10.6, 1024)])
    assert outcome(name, ">= 0.95", tmp_path, content) == "MISSED"

    def fused(compiled: float) -> dict[str, Any]:
        us = figures({"fused": 10.0, "apart": 40.0, "apart, compiled": compiled})
        return result("quantise", [{"part": "rms_norm", "m": 4096, "k": 7168, **us}])

    name = "RMSNorm fused with quantisation"
    assert outcome(name, ">= 1.6", tmp_path, fused(17.0)) == "reached"
    assert outcome(name, ">= 1.6", tmp_path, fused(15.0)) == "MISSED"

    def compiled(us: float) -> dict[str, Any]:
        device = figures({"eager": 10.0, "compiled": us, "replay": 9.0}, 0.2)
        row = {"recipe": BLOCK, "m": 16, "n": 1, "k": 1, "device": device}
        return result("compile", [row])

    name = "torch.compile and graph replay"
    assert outcome(name, ">= 1.0", tmp_path, compiled(10.1)) == "reached"
    assert outcome(name, ">= 1.0", tmp_path, compiled(10.5)) == "MISSED"

    def gradient(us: float) -> dict[str, Any]:
        row = {"recipe": BLOCK, "m": 16, "n": 1, "k": 1}
        return result(
            "gradient",
            [row | {"chosen": "gluon"} | figures({"gluon": us, "bf16": 9.0, "strips": 1.0})],
        )

    assert outcome("dX from the FP8 weight", ">= 0.9", tmp_path, gradient(9.9)) == "reached"
    assert outcome("dX from the FP8 weight", ">= 0.9", tmp_path, gradient(10.1)) == "MISSED"

    def host(us: float) -> dict[str, Any]:
        rows = [{"backend": "x", "recipe": "row", "over_entry_us": one} for one in (1.0, us)]
        return result("host", [*rows, {"backend": "y", "recipe": "row", "refused": {}}])

    assert outcome("host cost of fp8_linear", "<= 2.5", tmp_path, host(2.5)) == "reached"
    assert outcome("host cost of fp8_linear", "<= 2.5", tmp_path, host(2.6)) == "MISSED"


def test_experts(tmp_path: Path) -> None:
    def row(way: str, us: dict[str, float]) -> dict[str, Any]:
        shape = {"way": way, "experts": 8, "n": 4096, "k": 7168, "rows": 8192}
        return shape | figures(us)

    prefill = row("grouped", {"triton": 900.0, "gluon": 440.0, "deepgemm": 450.0, "read": 1.0})
    content = result("experts", [prefill])
    assert outcome("experts, prefill", ">= 1.0", tmp_path, content) == "reached"
    assert outcome("experts, prefill", ">= 3.3", tmp_path, content) == "reached"
    prefill["us"]["gluon"] = 480.0
    assert outcome("experts, prefill", ">= 1.0", tmp_path, content) == "MISSED"
    assert outcome("experts, prefill", ">= 3.3", tmp_path, content) == "MISSED"
    decode = result("experts", [row("batched", {"triton": 13.9, "read": 10.0})])
    assert outcome("experts, decode", "within", tmp_path, decode) == "reached"
    numbers = {"recipe": "row", "experts": 3, "found": {"triton, grouped": {"sqnr_db": 52.0}}}
    name = "numbers of experts"
    content = result("experts_numerics", [numbers])
    assert outcome(name, ">= 50", tmp_path, content) == "reached"
    content = result("experts_numerics", [numbers | {"wrong": {"triton, batched": "planted"}}])
    assert outcome(name, ">= 50", tmp_path, content) == "MISSED"


def test_committed_results_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main([]) in (0, 1)
    printed = capsys.readouterr().out
    assert "5044 calls, worst bf16 row 52.8 dB" in printed
    assert printed.count("\n") == 2 * len(TARGETS) + len(HELD_BY_TESTS) + 1


def test_ratios_name_the_fastest_other_and_its_noise() -> None:
    row = {"m": 1, "n": 2, "k": 3, **figures({"ours": 10.0, "a": 20.0, "b": 15.0}, 1.0)}

    (one,) = collect([row], lambda row: row, "ours", ("a", "b", "missing"))

    assert one == Ratio(1.5, 1 / 20 + 1 / 30, "1x2x3 (b)")
    assert each_at_least([], 1.0) is None
    assert mean_at_least([], 1.0) is None
