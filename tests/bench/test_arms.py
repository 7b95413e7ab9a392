"""An arm is timed only when its numbers are right; what is wrong or refused says so."""

from __future__ import annotations

import pytest
import torch

from bench.arms import RECIPES, Checked, Linear, backends_for, selectable
from fp8dispatch import registry
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.problem import Accuracy
from tests import oracle

SHAPES = ((1, 256, 256), (300, 200, 272), (5, 1300, 128))


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_right_arms_are_taken_in(recipe: str, shape: tuple[int, int, int]) -> None:
    operands = Linear(*shape, RECIPES[recipe], "cpu")
    checked = Checked()

    assert checked.try_arm("whole", operands.whole("eager"), operands.check("eager"))
    assert checked.try_arm("alone", operands.alone("eager"), operands.check("eager"))
    assert checked.try_arm("bf16", operands.bf16(), operands.check(None))
    assert list(checked.arms) == ["whole", "alone", "bf16"]
    assert checked.told() == {}


@pytest.mark.parametrize(
    ("row", "column"), [(0, 0), (150, 700), (299, 1299)], ids=["first", "middle", "last"]
)
def test_one_wrong_element_is_reported_and_not_timed(row: int, column: int) -> None:
    operands = Linear(300, 1300, 256, RECIPES["block"], "cpu")
    right = operands.whole("eager")

    def wrong() -> torch.Tensor:
        out = right()
        out[row, column] += 30
        return out

    checked = Checked()
    assert not checked.try_arm("planted", wrong, operands.check("eager"))
    assert checked.arms == {}
    assert "planted" in checked.wrong and "times the per-element bound" in checked.wrong["planted"]


@pytest.mark.unpoisoned  # the bench poisons memory itself
def test_an_output_that_nobody_writes_is_caught() -> None:
    operands = Linear(4, 256, 256, RECIPES["row"], "cpu")
    fresh: list[bool] = []

    def unwritten() -> torch.Tensor:
        out = torch.empty(4, 256, dtype=torch.bfloat16)
        fresh.append(bool(out.isnan().all()))
        return out

    checked = Checked()
    assert not checked.try_arm("unwritten", unwritten, operands.check("eager"))
    assert fresh == [True]  # not what another arm may have left there
    assert "not finite" in checked.wrong["unwritten"]


def test_a_wrong_shape_is_reported() -> None:
    operands = Linear(4, 256, 256, RECIPES["row"], "cpu")
    checked = Checked()

    assert not checked.try_arm(
        "short", lambda: operands.whole("eager")()[:3], operands.check("eager")
    )
    assert "shape (3, 256)" in checked.wrong["short"]


def test_unquantised_activations_are_wrong_for_a_backend_that_quantises() -> None:
    operands = Linear(64, 256, 256, RECIPES["block"], "cpu")
    weight = oracle.dequantized_weight(*operands.weights[0], operands.recipe)
    plain = lambda: (operands.x.double() @ weight.t()).bfloat16()  # noqa: E731
    checked = Checked()

    assert not checked.try_arm("plain", plain, operands.check("eager"))
    assert checked.try_arm("plain", plain, operands.check("weight_only"))


def test_tiles_of_tokens_are_judged_by_the_scales_of_tiles() -> None:
    operands = Linear(300, 256, 256, RECIPES["block"], "cpu")
    operands.x[7] *= 300  # the tile of this token takes a scale that coarsens its neighbours
    weight = oracle.dequantized_weight(*operands.weights[0], operands.recipe)
    wide = oracle.dequantized_activations(operands.x, operands.recipe, rows_per_scale=128)
    tiles = lambda: (wide @ weight.t()).bfloat16()  # noqa: E731
    checked = Checked()

    assert checked.try_arm("tiles", tiles, operands.check("fbgemm_tile"))
    assert not checked.try_arm("tokens", tiles, operands.check("eager"))


def test_a_refusal_is_kept_with_its_sentence() -> None:
    operands = Linear(4, 256, 256, RECIPES["row"], "cpu")
    checked = Checked()

    assert not checked.try_arm("deepgemm", operands.whole("deepgemm"), operands.check("deepgemm"))
    assert "deepgemm" in checked.told()["refused"]["deepgemm"]
    with pytest.raises(BackendUnavailableError):
        operands.alone("deepgemm")


def test_another_error_is_not_swallowed() -> None:
    operands = Linear(4, 256, 256, RECIPES["row"], "cpu")

    def broken() -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Checked().try_arm("broken", broken, operands.check("eager"))


def test_fast_accumulation_has_the_wider_bound() -> None:
    operands = Linear(64, 256, 256, RECIPES["row"], "cpu")
    right = operands.whole("eager")
    noise = torch.randn(64, 256) * 16 * 2.0**-8.5
    near = lambda: (right().float() + noise).bfloat16()  # noqa: E731
    checked = Checked()

    assert not checked.try_arm("exact", near, operands.check("eager"))
    assert checked.try_arm("fast", near, operands.check("eager", Accuracy.FAST))


def test_copies_hold_the_same_numbers_in_memory_of_their_own() -> None:
    operands = Linear(4, 256, 256, RECIPES["block"], "cpu", copies=3)

    assert len({data.data_ptr() for data, _ in operands.weights}) == 3
    assert all(
        torch.equal(operands.alone("eager", copy)(), operands.whole("eager")()) for copy in range(3)
    )


def test_torchao_is_tried_where_it_was_given_the_time() -> None:
    assert "torchao" in backends_for(None, 16, 4096, 7168)
    assert "torchao" not in backends_for(None, 16, 4096, 4096)
    assert backends_for(("triton",), 16, 4096, 4096) == ("triton",)


def test_what_must_be_named_is_nothing_to_choose_from() -> None:
    chosen = selectable(dict.fromkeys((*registry.NAMES, "automatic", "bf16")))

    assert {"gluon", "cublaslt"} <= set(chosen)
    assert not {"weight_only", "fbgemm_tile", "automatic", "bf16"} & set(chosen)


def test_an_arm_that_cannot_be_captured_is_refused_and_the_others_go_on() -> None:
    def refusing() -> int:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    checked = Checked()

    assert checked.captured({"good": lambda: 1, "bad": refusing}) == {"good": 1}
    assert checked.refused == {"bad, captured": "operation not permitted when stream is capturing"}


def test_a_capture_that_costs_the_context_is_not_swallowed() -> None:
    def lost() -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        Checked().captured({"bad": lost})
