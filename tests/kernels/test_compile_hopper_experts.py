"""The grouped Gluon kernel compiles for sm_90 as well as the one that it extends."""

from __future__ import annotations

from typing import Any

import pytest

from fp8dispatch.kernels.hopper_config import SHARED_MEMORY
from tests.kernels.compiled import facts_of, needs_compiler

KERNEL = "hopper_experts"

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler made of every variant, by kernel."""
    return facts_of("compile_hopper_experts.py", tmp_path_factory)


def test_a_call_is_three_kernels_that_fit(report: dict[str, dict[str, Any]]) -> None:
    for name, kernels in report.items():
        assert set(kernels) == {"_schedule_kernel", "_prepare_kernel", KERNEL}, name
        facts = kernels[KERNEL]
        assert facts["tma_loads"] == 3, name
        assert facts["shared"] <= SHARED_MEMORY, name
        # A launch that needs no memory of its own can be made directly.
        assert facts["scratch"] == 0, name


def test_nothing_spills(report: dict[str, dict[str, Any]]) -> None:
    for name, kernels in report.items():
        facts = kernels[KERNEL]
        assert (facts["stack"], facts["local"], facts["local_loads"]) == (0, 0, 0), name
        assert facts["highest_register"] <= 240, name  # what a consumer is given
        others = [other for one, other in kernels.items() if one != KERNEL]
        assert all(other["spills"] == 0 for other in others), name


def test_products_are_not_serialised(report: dict[str, dict[str, Any]]) -> None:
    for name, kernels in report.items():
        assert not kernels[KERNEL]["serialised"], name
        assert kernels[KERNEL]["products"] == 16, name  # two consumers, two halves, four each


def test_a_promotion_is_one_instruction_for_each_element(
    report: dict[str, dict[str, Any]],
) -> None:
    assert report["prefill"][KERNEL]["fused"] == 2 * 2 * 64 * 128 // 128


def test_rows_of_16_bytes_are_stored_16_bytes_at_a_time(
    report: dict[str, dict[str, Any]],
) -> None:
    """64x256 elements for each of two consumers of 128 threads."""
    assert report["prefill"][KERNEL]["stores"] == {"128": 2 * 64 * 256 // 128 // 8}
    assert report["fp32_bias"][KERNEL]["stores"] == {"128": 2 * 64 * 256 // 128 // 4}
    assert report["ragged"][KERNEL]["stores"] == {"16": 2 * 64 * 256 // 128}
