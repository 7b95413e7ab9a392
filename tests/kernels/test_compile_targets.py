"""Kernels compile for GPUs that are not here, and use the instructions that they should."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.kernels.compiled import facts_of, needs_compiler
from tests.kernels.spills import allowed_stack

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler made of every variant, by ``"<target>.<variant>"``."""
    return facts_of("compile_targets.py", tmp_path_factory)


def gemms(report: dict[str, dict[str, Any]], target: int) -> dict[str, dict[str, Any]]:
    prefix = f"{target}.gemm"
    return {name: facts for name, facts in report.items() if name.startswith(prefix)}


def test_every_target_compiles(report: dict[str, dict[str, Any]]) -> None:
    assert {name.split(".")[0] for name in report} == {"80", "89", "90", "100", "120"}
    assert all(facts["registers"] > 0 for facts in report.values())


@pytest.mark.parametrize("variant", ["gemm_block", "gemm_row"])
def test_hopper_multiplies_fp8_from_tma_loads(
    variant: str, report: dict[str, dict[str, Any]]
) -> None:
    facts = report[f"90.{variant}"]

    assert facts["fp8_wgmma"] > 0
    assert facts["tma_loads"] > 0
    assert facts["stack"] == 0
    assert facts["local"] == 0
    # Two programs of 128 threads on an SM of 65536 registers and 233472 bytes of shared memory.
    assert facts["registers"] <= 255
    assert 2 * (facts["shared"] + 1024) <= 233_472


def test_hopper_decode_and_64_row_tiles_do_not_spill(report: dict[str, dict[str, Any]]) -> None:
    for variant in ("gemm_small", "gemm_32_rows", "gemm_64_rows", "groups", "groups_few", "rows"):
        assert report[f"90.{variant}"]["stack"] == 0, variant
    assert report["90.gemm_64_rows"]["fp8_wgmma"] > 0


def test_tiles_that_tuning_tries_multiply_as_the_default_does(
    report: dict[str, dict[str, Any]],
) -> None:
    """With the same instructions, which is why no bit differs; and none of them spills."""
    defaults = {"block M=2048": "block", "row M=2048": "row", "block M=64": "64_rows"}
    defaults["block M=8"] = "small"
    found = {name: facts for name, facts in report.items() if ".gemm_tile" in name}
    assert {name.split(".")[0] for name in found} == {"80", "89", "90", "100", "120"}
    assert len(found) > 30
    for name, facts in found.items():
        target, size = re.findall(r"(\d+)\.gemm_tile (.*?M=\d+) ", name)[0]
        default = report[f"{target}.gemm_{defaults[size]}"]
        for instruction in ("fp8_wgmma", "fp8_mma", "tma_loads"):
            assert (facts[instruction] > 0) == (default[instruction] > 0), (name, instruction)
        assert facts["dots"] == default["dots"], name
        if target != "80":  # where the default itself decodes more than the registers hold
            assert facts["stack"] == facts["local"] == 0, name
        if target in ("90", "100") and "2 per SM" in name:
            assert 2 * (facts["shared"] + 1024) <= 233_472, name


@pytest.mark.parametrize("target", [80, 89, 90, 100, 120])
def test_every_partial_product_starts_from_zero(
    target: int, report: dict[str, dict[str, Any]]
) -> None:
    """An accumulator carried through the loop would be the inexact sum of the tensor core."""
    for name, facts in gemms(report, target).items():
        assert facts["dots"] > 0, name
        assert facts["fresh_dots"] == facts["dots"], name


@pytest.mark.parametrize("target", [89, 120])
def test_consumer_cards_multiply_fp8(target: int, report: dict[str, dict[str, Any]]) -> None:
    assert report[f"{target}.gemm_block"]["fp8_mma"] > 0


def test_every_program_fits_into_shared_memory(report: dict[str, dict[str, Any]]) -> None:
    """What a program of each target may ask for; the launch of a larger one fails."""
    limits = {"80": 166_912, "89": 101_376, "90": 232_448, "100": 232_448, "120": 101_376}
    for name, facts in report.items():
        assert facts["shared"] <= limits[name.split(".")[0]], name


def test_gradients_multiply_16_bit_tiles_without_spilling(
    report: dict[str, dict[str, Any]],
) -> None:
    found = {name: facts for name, facts in report.items() if ".grad" in name}
    assert {name.split(".")[0] for name in found} == {"80", "89", "90", "100", "120"}
    for name, facts in found.items():
        assert facts["dots"] > 0, name
        assert facts["fp8_mma"] == facts["fp8_wgmma"] == 0, name
        assert facts["stack"] <= allowed_stack(name), name


def test_fused_quantisers_stay_in_registers(report: dict[str, dict[str, Any]]) -> None:
    found = {name: facts for name, facts in report.items() if ".norm" in name or ".silu" in name}
    assert len(found) == 16
    for name, facts in found.items():
        assert facts["stack"] == facts["local"] == 0, name


def test_cards_without_fp8_get_no_fp8_instruction(report: dict[str, dict[str, Any]]) -> None:
    for name, facts in report.items():
        if name.startswith("80."):
            assert facts["fp8_mma"] == facts["fp8_wgmma"] == facts["fp8_conversions"] == 0, name
