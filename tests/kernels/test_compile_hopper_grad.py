"""The Gluon kernel for dX compiles for sm_90 and does not spill; it converts ahead where asked."""

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

SCRIPT = Path(__file__).with_name("compile_hopper_grad.py")
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


def test_every_shape_compiles_and_fits(report: dict[str, dict[str, Any]]) -> None:
    for name, facts in report.items():
        copies = 2 if name == "tall" else 3  # a wide tile has two blocks of codes
        assert facts["tma_loads"] == copies + ("rows" in name), name
        assert facts["shared"] <= SHARED_MEMORY, name
        # A launch that needs no memory of its own can be made directly.
        assert facts["scratch"] == 0, name


def test_nothing_spills(report: dict[str, dict[str, Any]]) -> None:
    for name, facts in report.items():
        assert (facts["stack"], facts["local"], facts["local_loads"]) == (0, 0, 0), name
        assert facts["highest_register"] <= 240, name  # what a consumer is given


def test_products_run_by_themselves(report: dict[str, dict[str, Any]]) -> None:
    """Two consumers, even and odd columns, 64 of N by 16: none waits, none loses its operands."""
    for name, facts in report.items():
        assert facts["products"] == 2 * 2 * 4, name
        assert not facts["serialised"], name
        assert facts["overwritten"] == [], name


def test_a_step_is_converted_ahead_where_that_is_asked_for(
    report: dict[str, dict[str, Any]],
) -> None:
    """Under the products of the step before: 64x128 elements by 128 threads, each once."""
    for name, facts in report.items():
        if not name.endswith("_ahead"):
            continue
        elements = 64 * 128 // 128
        assert facts["loads_of_codes"] == elements // 16, name
        assert facts["decoded"] == elements // 2, name
        assert facts["scaled"] == elements, name
        assert facts["rounded"] == elements // 2, name
