"""The canary on a GPU: right for what is known to be right, in this process and in a child."""

from __future__ import annotations

import math

import pytest
import torch

from fp8dispatch import registry
from fp8dispatch.probes import isolated
from fp8dispatch.probes.isolated import run_isolated
from fp8dispatch.probes.numerics import run_canary
from fp8dispatch.recipe import BLOCK_128, ROW, Recipe
from tests import matrix
from tests.probes.planted import Fault, Planted, uninitialised, unwritten_tail

pytestmark = pytest.mark.gpu


@pytest.mark.unpoisoned
@pytest.mark.parametrize("recipe", matrix.RECIPES)
@pytest.mark.parametrize("backend", ["eager", "triton", "cublaslt"])
def test_the_canary_is_right(backend: str, recipe: str) -> None:
    result = run_canary(registry.load(backend), torch.device("cuda", 0), matrix.RECIPES[recipe])
    if result.applicable:
        assert result.right, result.reason
        assert result.worst <= 1
    else:
        assert backend == "cublaslt", result.reason


@pytest.mark.parametrize("recipe", ["tensor", "row", "block128x128", "group128"])
def test_cublaslt_is_tested_and_not_only_refused(recipe: str) -> None:
    chosen = matrix.RECIPES[recipe]
    assert run_canary(registry.load("cublaslt"), torch.device("cuda", 0), chosen).right


@pytest.mark.unpoisoned
@pytest.mark.parametrize("fault", [uninitialised, unwritten_tail])
def test_what_is_not_written_is_poisoned(fault: Fault) -> None:
    """By the canary itself: the fixture that poisons every test is off here."""
    result = run_canary(Planted(fault), torch.device("cuda", 0), BLOCK_128)
    assert "not finite" in result.reason


@pytest.mark.parametrize("recipe", [ROW, BLOCK_128], ids=str)
def test_a_child_process_gives_the_same_answer(recipe: Recipe) -> None:
    result = run_isolated("cublaslt", "cuda:0", recipe, 120)
    assert result.outcome == "right", result.reason


def test_a_lost_context_in_the_child_is_not_ours() -> None:
    result = run_isolated("tests.probes.planted:ASSERTS_ON_DEVICE", "cuda:0", BLOCK_128, 120)
    assert result.outcome == "crashed", result.reason
    assert "lost the CUDA context" in result.reason
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_a_kernel_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "BUSY_SHARE", math.inf)
    result = run_isolated("tests.probes.planted:HANGS_ON_DEVICE", "cuda:0", BLOCK_128, 3)
    assert result.outcome == "hung", result.reason
    assert float(torch.ones(3, device="cuda").sum()) == 3
