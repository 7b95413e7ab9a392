"""The Gluon kernels compile for sm_90, do not spill, and keep their products asynchronous."""

from __future__ import annotations

from typing import Any

import pytest

from fp8dispatch.kernels.hopper_config import SHARED_MEMORY
from tests.kernels.compiled import facts_of, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler made of every variant."""
    return facts_of("compile_hopper.py", tmp_path_factory)


@pytest.fixture(scope="module")
def report(everything: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The GEMMs among them."""
    return {name: facts for name, facts in everything.items() if "quantise" not in name}


def test_every_kernel_compiles_and_fits(report: dict[str, dict[str, Any]]) -> None:
    kernels = {facts["kernel"] for facts in report.values()}
    assert kernels == {"hopper_gemm", "hopper_gemm_split", "hopper_decode"}
    for name, facts in report.items():
        # The weight is the second operand, in a decode kernel the first.
        mixed = "e5m2.e4m3" if facts["kernel"] == "hopper_decode" else "e4m3.e5m2"
        assert facts["fp8_wgmma"] == [mixed if "e5m2" in name else "e4m3.e4m3"], name
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

    128 of K are four products over 128 threads: of 64 rows and as many columns as the tile of a
    consumer has; 16 rows of activations in a decode kernel.
    """
    for name, elements in (
        ("wide", 64 * 128),
        ("wide_e5m2", 64 * 128),
        ("wide_blocks", 64 * 128),
        ("split", 64 * 128),
        ("split_blocks", 64 * 128),
        ("narrow", 64 * 64),
        ("narrow_split", 64 * 64),
        ("decode", 64 * 16),
    ):
        facts = report[name]
        assert facts["fused"] == facts["products"] // 4 * (elements // 128), name


def test_an_early_start_touches_the_weight_alone_before_it_waits(
    report: dict[str, dict[str, Any]],
) -> None:
    """One copy for each box of the ring (of each block, where K is no multiple of 128)."""
    for name, facts in report.items():
        assert facts["waits"] == ("early" in name), name
        assert facts["lets_start"] == 0, name  # what comes behind starts after the end
    for name, copies in (("early", 20 // 4), ("early_split_flat", 6)):
        facts = report[name]
        for accesses in (facts["before_wait"], facts["before_wait_assembled"]):
            assert len(accesses) == copies, (name, accesses)
            assert all(one.startswith(("cp.async.bulk.tensor", "UTMALDG")) for one in accesses), (
                name,
                accesses,
            )
    # As many of the activations follow, and those of the ring's next turns, one of each operand.
    assert report["early"]["tma_loads"] == 2 * 5 + 2 == report["decode"]["tma_loads"]


def test_the_quantiser_lets_the_next_kernel_start_and_waits_for_nobody(
    everything: dict[str, dict[str, Any]],
) -> None:
    """So it is launched in the order of the stream, and what it lets start is behind all else."""
    for name in ("quantise_groups", "quantise_rows"):
        assert everything[name]["lets_start"] == 1, name
        assert everything[name]["waits"] == 0, name


def test_aligned_outputs_leave_by_bulk_copies(report: dict[str, dict[str, Any]]) -> None:
    assert report["wide"]["tma_stores"] == 8  # two consumers, four pieces of 64 columns each
    assert report["square_ragged"]["tma_stores"] == 0
