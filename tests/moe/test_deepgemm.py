"""DeepGEMM's grouped GEMMs: refusals, and both layouts over a fake that asserts them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fp8dispatch import BackendUnavailableError, registry
from fp8dispatch.moe.backends import deepgemm
from fp8dispatch.moe.backends.compute import deepgemm_contiguous, deepgemm_masked
from fp8dispatch.moe.backends.deepgemm import DeepGemm, masked_rows
from fp8dispatch.recipe import BLOCK_128, ROW
from tests import oracle
from tests.backends.cases import B200, H200, told
from tests.moe import fake_grouped
from tests.moe.cases import WAYS, make_call
from tests.moe.library import CONTIGUOUS, STATIC, routed, run

if TYPE_CHECKING:
    import types

    import torch


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return fake_grouped.plant_deepgemm(monkeypatch)


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layouts that calls took."""
    taken: list[str] = []

    def noting(name: str, used: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: object) -> torch.Tensor:
            taken.append(name)
            return used(*arguments)

        return call

    for name, module in (("contiguous", deepgemm_contiguous), ("masked", deepgemm_masked)):
        monkeypatch.setattr(module, "run", noting(name, module.run))
    return taken


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("static", ["none", "one"])
def test_rows_reach_their_places_and_come_back(way: str, static: str, layouts: list[str]) -> None:
    call = make_call(way, BLOCK_128, 4, 136, 144, 150, static=static)

    oracle.assert_matches(run(DeepGemm(), call), call.truth(), min_sqnr=-math.inf)
    assert layouts == ["masked" if way.startswith("batched") else "contiguous"]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("way", ["batched", "grouped"])
@pytest.mark.parametrize(("rows", "experts"), [(1, 5), (9, 40), (130, 1), (300, 3)])
def test_any_number_of_rows_and_experts(way: str, rows: int, experts: int) -> None:
    for sentinels, concentrated in ((0.0, True), (0.5, False), (1.1, False)):
        call = make_call(
            way, BLOCK_128, experts, 16, 144, rows, sentinels=sentinels, concentrated=concentrated
        )
        oracle.assert_matches(run(DeepGemm(), call), call.truth(), min_sqnr=-math.inf)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("way", ["batched-gather", "grouped-index"])
def test_no_input_gives_zeros(way: str) -> None:
    call = make_call(way, BLOCK_128, 3, 16, 144, 4)
    call.arguments["x"] = call.arguments["x"][:0]

    assert not run(DeepGemm(), call).any()


@pytest.mark.parametrize(
    ("problem", "rows"),
    [
        (routed(m=1, batched=True), 128),
        (routed(m=129, batched=True), 256),
        (routed(m=256, batched=True, experts=256), 256),  # 0.95 GiB
        (routed(m=257, batched=True, experts=256), None),
        (routed(m=1), None),
    ],
)
def test_few_rows_in_any_order_are_masked(problem: object, rows: int | None) -> None:
    assert masked_rows(problem) == rows  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "fits"), [(64, True), (128, True), (224, False), (256, False)])
def test_a_library_with_other_tiles_is_refused(
    library: types.ModuleType, rows: int, fits: bool
) -> None:
    library.get_mk_alignment_for_contiguous_layout = lambda: rows  # type: ignore[attr-defined]
    call = make_call("grouped", BLOCK_128, 3, 16, 144, 6)
    if fits:
        oracle.assert_matches(run(DeepGemm(), call), call.truth(), min_sqnr=-math.inf)
        return
    with pytest.raises(BackendUnavailableError, match=rf"found an alignment of {rows}"):
        run(DeepGemm(), call)


@pytest.mark.parametrize("entry", ["contiguous", "masked"])
def test_a_release_without_an_entry_is_refused(library: types.ModuleType, entry: str) -> None:
    (name,) = (name for name in (deepgemm.CONTIGUOUS, deepgemm.MASKED) if name.endswith(entry))
    delattr(library, name)
    with pytest.raises(BackendUnavailableError, match=rf"needs deep_gemm\.{name}"):
        run(DeepGemm(), make_call("grouped", BLOCK_128, 3, 16, 144, 6))


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (routed(), []),
        (routed(batched=True, gathers=True), []),
        (routed(ROW), ["recipe: needs a block recipe, found row"]),
        (routed(static_activation=True, static_per_expert=True), [STATIC]),
        (
            routed(m=2**19, n=64, k=4096),
            [
                "size: needs M x K below 2**31 elements (32-bit offsets), found 2147483648",
                "size: needs padded rows below 2**31 elements (32-bit offsets), found 525304 rows "
                "of 4096",
            ],
        ),
        (routed(weight_contiguous=False), [CONTIGUOUS]),
        (routed(n=4100), ["align-n: needs N a multiple of 8, found N=4100"]),
        (routed(k=7160), ["align-k: needs K a multiple of 16, found K=7160"]),
    ],
)
def test_refusals(problem: object, expected: list[str]) -> None:
    assert told(DeepGemm().refuse_problem(problem, H200)) == expected  # type: ignore[arg-type]


def test_it_is_verified_with_one_release_and_stands_behind_our_kernels() -> None:
    backend = registry.load_experts("deepgemm")

    assert backend.refuse_machine(H200) == ()
    assert backend.refuse_machine(B200)
    for version, verified in (("0.1.5.post1", True), ("0.1.6", False)):
        machine = replace(H200, versions={**H200.versions, "sgl-deep-gemm": version})
        assert backend.is_verified(machine) is verified


def test_a_tile_whose_first_row_leads_nowhere_is_computed(library: types.ModuleType) -> None:
    """The library takes a tile's expert from its first row."""
    call = make_call("grouped-index", BLOCK_128, 2, 16, 144, 9, sentinels=0.0)
    call.arguments["gather"][0] = -1
    call.sources[0] = None

    oracle.assert_matches(run(DeepGemm(), call), call.truth(), min_sqnr=-math.inf)
