"""Under ``batch_invariant=True`` a row's result is the same bits whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import fp8_linear, policy, registry
from fp8dispatch.backends.triton import Triton
from fp8dispatch.errors import BackendUnavailableError, ConfigurationError
from fp8dispatch.kernels import scaled_gemm
from fp8dispatch.kernels.gemm_config import GemmConfig
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle

N, K = 40, 272  # small: on the CPU the kernels run in an interpreter
RECIPES = (BLOCK_128, ROW, TENSOR, Recipe(Granularity.BLOCK, (1, 32)))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_row_is_summed_alike_in_every_batch(recipe: Recipe, device: str) -> None:
    weight, scale = oracle.make_weight(N, K, recipe, device=device)
    x = torch.randn(66, K, device=device, dtype=torch.bfloat16)
    bias = torch.randn(N, device=device)

    def linear(rows: torch.Tensor) -> torch.Tensor:
        return fp8_linear(rows, weight, scale, bias, block_size=recipe.block_size)

    with fp8dispatch.use_backend(batch_invariant=True):
        whole = linear(x)
        for m in (1, 17, 33, 64):
            assert torch.equal(linear(x[:m]), whole[:m]), m
        for row in (15, 65):
            assert torch.equal(linear(x[row : row + 1]), whole[row : row + 1]), row
        assert torch.equal(linear(x.flip(0)), whole.flip(0))
    expected = oracle.linear_truth(x, weight, scale, recipe, bias)
    oracle.assert_matches(whole, expected, label=str(recipe))


def test_the_tile_is_chosen_for_the_same_rows_in_every_batch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of 16 rows may sum in another order than one of 64, on another GPU if not on this."""
    seen: list[int] = []
    choose = scaled_gemm.choose_config

    def watched(m: int, *rest: Any, **named: Any) -> GemmConfig:
        seen.append(m)
        return choose(m, *rest, **named)

    monkeypatch.setattr(scaled_gemm, "choose_config", watched)
    weight, scale = oracle.make_weight(N, K, ROW, device=device)
    x = torch.randn(65, K, device=device, dtype=torch.bfloat16)
    for m in (1, 65):
        fp8_linear(x[:m], weight, scale, backend="triton")
    assert len(set(seen)) == 2, "without the statement the tile follows M"
    seen.clear()
    with fp8dispatch.use_backend("triton", batch_invariant=True):
        for m in (1, 65):
            fp8_linear(x[:m], weight, scale)
    assert len(seen) == 2
    assert len(set(seen)) == 1


def test_backends_that_sum_by_the_number_of_rows_refuse(device: str) -> None:
    weight, scale = oracle.make_weight(N, K, BLOCK_128, device=device)
    x = torch.randn(3, K, device=device, dtype=torch.bfloat16)
    with fp8dispatch.use_backend(batch_invariant=True):
        decision = fp8dispatch.explain(x, weight, scale)
        with pytest.raises(BackendUnavailableError, match="needs a policy without batch_invariant"):
            fp8_linear(x, weight, scale, backend="eager")
    assert isinstance(registry.load(decision.backend), Triton)
    assert "batch-invariant" in str(decision.problem)
    assert "batch-invariance" in {reason.code for reason in dict(decision.refusals)["eager"]}


def test_the_choice_does_not_depend_on_the_number_of_rows(device: str) -> None:
    weight, scale = oracle.make_weight(N, K, ROW, device=device)
    with fp8dispatch.use_backend(batch_invariant=True):
        routes = {
            (decision.backend, decision.route)
            for m in (1, 16, 65)
            if (decision := fp8dispatch.explain(torch.randn(m, K, device=device), weight, scale))
        }
    assert len(routes) == 1


def test_where_it_can_be_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry.NAMES
    assert not policy.resolve(None, known).batch_invariant
    fp8dispatch.set_backend(batch_invariant=True)
    try:
        assert policy.resolve(None, known).batch_invariant
        assert policy.resolve("triton", known).batch_invariant
        with fp8dispatch.use_backend("triton", batch_invariant=False):
            assert not policy.resolve(None, known).batch_invariant
            with fp8dispatch.use_backend("-cublaslt"):
                assert not policy.resolve(None, known).batch_invariant
    finally:
        fp8dispatch.set_backend()
    for text, invariant in (("1", True), ("on", True), ("0", False), ("", False)):
        monkeypatch.setenv(policy.INVARIANT_VARIABLE, text)
        policy.reload_environment()
        assert policy.resolve(None, known).batch_invariant is invariant
    monkeypatch.setenv(policy.INVARIANT_VARIABLE, "perhaps")
    policy.reload_environment()
    with pytest.raises(ConfigurationError, match="BATCH_INVARIANT must be 1 or 0, found 'perhaps'"):
        policy.resolve(None, known)
    monkeypatch.undo()
    policy.reload_environment()
    with pytest.raises(ConfigurationError, match="batch_invariant must be True, False or None"):
        fp8dispatch.use_backend(batch_invariant="yes")  # type: ignore[arg-type]


def test_a_decorated_function_states_it_in_every_call() -> None:
    @fp8dispatch.use_backend(batch_invariant=True)
    def stated() -> bool:
        return policy.resolve(None, registry.NAMES).batch_invariant

    assert stated()
    assert stated()
    assert not policy.resolve(None, registry.NAMES).batch_invariant


def test_experts_say_that_they_cannot_promise_it(device: str) -> None:
    """Their tiles follow the rows of each expert; nothing may run as if nobody had asked."""
    weight = torch.ones(2, 8, 16, device=device).to(torch.float8_e4m3fn)
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    x = torch.ones(3, 16, device=device)
    with (
        fp8dispatch.use_backend(batch_invariant=True),
        pytest.raises(BackendUnavailableError, match="needs a policy without batch_invariant"),
    ):
        fp8dispatch.fp8_experts_batched(x, weight, torch.ones(2, device=device), ids)
