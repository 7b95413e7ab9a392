"""The Gluon kernels compile for sm_90, do not spill, and keep their products asynchronous."""

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

SCRIPT = Path(__file__).with_name("compile_hopper.py")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None,
    reason="needs Triton's compiler, which exists for Linux",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler made of every variant."""
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


def test_every_kernel_compiles_and_fits(report: dict[str, dict[str, Any]]) -> None:
    kernels = {facts["kernel"] for facts in report.values()}
    assert kernels == {"hopper_gemm", "hopper_gemm_split", "hopper_decode"}
    for name, facts in report.items():
        assert facts["fp8_wgmma"] > 0, name
        assert facts["tma_loads"] > 0, name
        assert facts["shared"] <= SHARED_MEMORY, name
        # A launch that needs no memory of its own can be made directly.
        assert facts["scratch"] == 0, name


def test_nothing_spills(report: dict[str, dict[str, Any]]) -> None:
    for name, facts in report.items():
        assert (facts["stack"], facts["local"], facts["local_loads"]) == (0, 0, 0), name
        # 240 registers are what the consumers are given; a decode program may have 255.
        assert facts["highest_register"] <= 240, name


def test_products_are_not_serialised(report: dict[str, dict[str, Any]]) -> None:
    for name, facts in report.items():
        assert not facts["serialised"], name


def test_a_promotion_is_one_instruction_for_each_element(
    report: dict[str, dict[str, Any]],
) -> None:
    """A product is followed by one fused multiply-add per element and no separate scaling.

    128 of K are four products of 64x128 or of 64x16, over 128 threads.
    """
    for name, elements in (("wide", 64 * 128), ("split", 64 * 128), ("decode", 64 * 16)):
        facts = report[name]
        assert facts["fused"] == facts["products"] // 4 * (elements // 128), name


def test_aligned_outputs_leave_by_bulk_copies(report: dict[str, dict[str, Any]]) -> None:
    assert report["wide"]["tma_stores"] == 8  # two consumers, four pieces of 64 columns each
    assert report["square_ragged"]["tma_stores"] == 0
