"""The kernels of expert matmuls compile for GPUs that are not here; see `test_compile_targets`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.compiled import facts_of, needs_compiler
from tests.kernels.spills import allowed_stack

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler made of every variant, by ``"<target>.<variant>"``."""
    return facts_of("compile_experts.py", tmp_path_factory)


def test_every_target_compiles_every_kernel(report: dict[str, dict[str, Any]]) -> None:
    assert {name.split(".")[0] for name in report} == {"80", "89", "90", "100", "120"}
    assert {facts["kernel"] for facts in report.values()} == {
        "_experts_gemm_kernel",
        "_grad_input_kernel",
        "_grad_bias_kernel",
        "_sum_rows_kernel",
        "_sort_kernel",
        "_schedule_kernel",
        "_quantize_sorted_kernel",
    }


def test_nothing_spills(report: dict[str, dict[str, Any]]) -> None:
    for name, facts in report.items():
        assert facts["stack"] <= allowed_stack(name), name
        assert facts["local"] == 0, name


def test_hopper_multiplies_fp8_and_loads_sorted_rows_by_tma(
    report: dict[str, dict[str, Any]],
) -> None:
    for variant in ("gemm_prefill", "gemm_indexed", "gemm_row"):
        facts = report[f"90.{variant}"]
        assert facts["fp8_wgmma"] > 0, variant
        # Two programs of 128 threads on an SM of 65536 registers and 233472 bytes.
        assert 2 * (facts["shared"] + 1024) <= 233_472, variant
    assert report["90.gemm_prefill"]["tma_loads"] > 0


def test_every_partial_product_starts_from_zero(report: dict[str, dict[str, Any]]) -> None:
    """An accumulator carried through the loop would be the inexact sum of the tensor core."""
    gemms = {name: facts for name, facts in report.items() if ".gemm" in name}
    assert len(gemms) == 15
    for name, facts in gemms.items():
        assert facts["dots"] > 0, name
        assert facts["fresh_dots"] == facts["dots"], name


def test_cards_without_fp8_get_no_fp8_instruction(report: dict[str, dict[str, Any]]) -> None:
    for name, facts in report.items():
        if name.startswith("80."):
            assert facts["fp8_mma"] == facts["fp8_wgmma"] == facts["fp8_conversions"] == 0, name
