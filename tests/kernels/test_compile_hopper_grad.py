"""The Gluon kernel for dX compiles for sm_90 and does not spill; it converts ahead where asked."""

from __future__ import annotations

from typing import Any

import pytest

from fp8dispatch.kernels.hopper_config import SHARED_MEMORY
from tests.kernels.compiled import facts_of, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler made of every variant."""
    return facts_of("compile_hopper_grad.py", tmp_path_factory)


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
