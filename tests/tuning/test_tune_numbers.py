"""Backends that compute wrong numbers at a size: told, never chosen, heard when tuned again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch.errors import (
    BackendUnavailableError,
)
from fp8dispatch.overrides import use_backend
from fp8dispatch.probes.numerics import poison
from fp8dispatch.recipe import Granularity, Recipe
from tests.tuning.cases import K, N, explained, states, tune
from tests.tuning.conftest import Workbench


def scrambled(out: torch.Tensor, *_: Any) -> torch.Tensor:
    return out.roll(1, 1)


def one_wrong(out: torch.Tensor, *_: Any) -> torch.Tensor:
    out[-1, -1] += 3 * out.float().abs().max().to(out.dtype)
    return out


def unwritten(out: torch.Tensor, *_: Any) -> torch.Tensor:
    poisoned = torch.empty_like(out)
    poisoned[:-1] = out[:-1]
    return poisoned


def not_finite(out: torch.Tensor, *_: Any) -> torch.Tensor:
    out[0, 0] = torch.inf
    return out


def transposed(out: torch.Tensor, *_: Any) -> torch.Tensor:
    return out.t().contiguous().view(out.shape)


def scaled(out: torch.Tensor, *_: Any) -> torch.Tensor:
    return (out.float() * 1.25).to(out.dtype)


def changes_its_weight(out: torch.Tensor, x: Any, weight: Any, problem: Any) -> torch.Tensor:
    weight.data.view(torch.uint8)[0, 0] ^= 0x80
    return out


FAULTS = [scrambled, one_wrong, unwritten, not_finite, transposed, scaled, changes_its_weight]


@pytest.mark.parametrize(
    ("fault", "recipe"),
    [*((fault, "block") for fault in FAULTS), (one_wrong, "tensor"), (scaled, "row")],
)
def test_wrong_numbers_at_a_size_are_told_and_never_chosen(
    bench: Workbench, fault: Callable[..., torch.Tensor], recipe: str
) -> None:
    """Right in the canary, whose sizes differ, and wrong at the size that is tuned."""

    def at_this_size(out: torch.Tensor, x: Any, weight: Any, problem: Any) -> torch.Tensor:
        return fault(out, x, weight, problem) if problem.n == N else out

    bench.plant("broken", 1.0, fault=at_this_size)
    bench.plant("swift", 10.0)

    report = tune(bench, recipe=recipe)

    (point,) = report.points
    assert report.wrong == ("broken",)
    assert point.order == ("swift", "eager")
    weight, scale = fp8dispatch.quantize(torch.randn(N, K), recipe)
    x = torch.zeros(100, K, dtype=torch.bfloat16)
    with use_backend("-eager"):  # which comes first off the GPU where nothing was measured
        decision = fp8dispatch.explain(x, weight, scale)  # another bucket: wrong all the same
    assert decision.backend == "swift"
    (reason,) = dict(decision.refusals)["broken"]
    assert reason.code == "numbers"
    assert "tuning found" in reason.found
    with pytest.raises(BackendUnavailableError, match="tuning found"):
        fp8dispatch.fp8_linear(x, weight, scale, backend="broken")
    other, scale = fp8dispatch.quantize(torch.randn(N + 1, K), recipe)
    fp8dispatch.fp8_linear(x, other, scale, backend="broken")  # of another size nothing is known


def test_memory_is_poisoned_before_each_output(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    swift = bench.plant("swift", 10.0)

    def noted(out: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(out.shape))
        return out

    swift.fault = noted
    tune(bench, (3, 9, K))  # its canary runs now
    seen.clear()
    real: Any = poison
    monkeypatch.setattr(
        "fp8dispatch.tuning.measure.poison",
        lambda problem, device: (seen.append("poison"), real(problem, device)),
    )

    tune(bench, backends="swift")

    assert seen[:2] == ["poison", (3, N)]
    assert seen.count("poison") == 1


def test_a_backend_that_was_wrong_is_heard_again_when_tuned_again(bench: Workbench) -> None:
    broken = bench.plant("broken", 1.0, fault=lambda out, *rest: out * (rest[-1].n != N))
    assert tune(bench).wrong == ("broken",)

    broken.fault = None
    (point,) = tune(bench).points

    assert point.order[0] == "broken"
    assert explained().backend == "broken"


def test_all_of_a_large_output_is_checked(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The truth comes in strips of columns; a fault in any of them is found."""
    monkeypatch.setattr("fp8dispatch.tuning.operands._STRIP_ELEMENTS", 5 * K)

    def last_column(out: torch.Tensor, x: Any, weight: Any, problem: Any) -> torch.Tensor:
        if problem.n == N:
            out[:, -1] *= 1.5
        return out

    bench.plant("broken", 1.0, fault=last_column)
    bench.plant("swift", 10.0)

    (point,) = tune(bench, recipe=Recipe(Granularity.BLOCK, (7, 32))).points

    assert states(point)["broken"] == "wrong"
    assert re.match(r"from column 20 on, row \d, column 3 is", point.wrong["broken"])
    assert point.order == ("swift", "eager")
