"""The grouped Gluon kernel compiles for sm_90 as well as the one that it extends."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8dispatch.kernels.hopper_config import SHARED_MEMORY

SCRIPT = Path(__file__).with_name("compile_hopper_experts.py")
ROOT = Path(__file__).parents[2]
KERNEL = "hopper_experts"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None,
    reason="needs Triton's compiler, which exists for Linux",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler made of every variant, by kernel."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    found: dict[str, dict[str, Any]] = json.loads(child.stdout)
    del found["triton"]
    return found


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
