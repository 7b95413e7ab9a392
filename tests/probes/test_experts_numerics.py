"""The canary of expert matmuls passes what is right and catches faults of routing and of scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fp8dispatch.errors import Refusal
from fp8dispatch.moe.backends.contract import ExpertWeights
from fp8dispatch.moe.backends.eager import Eager
from fp8dispatch.moe.backends.missing import Missing
from fp8dispatch.moe.routing import Routing
from fp8dispatch.probes.numerics import CanaryResult, run_canary
from fp8dispatch.problem import Accuracy, ExpertsProblem
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe

CPU = torch.device("cpu")
Fault = Callable[..., torch.Tensor]


class Planted(Eager):
    """Plain torch with a fault in it."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def experts(self, *call: Any) -> torch.Tensor:
        return self._fault(super().experts, *call)


def canary(backend: Any, recipe: Recipe = BLOCK_128) -> CanaryResult:
    return run_canary(backend, CPU, recipe)


@pytest.mark.parametrize(
    "recipe", [TENSOR, ROW, BLOCK_128, Recipe(Granularity.BLOCK, (1, 32))], ids=str
)
def test_plain_torch_is_right(recipe: Recipe) -> None:
    result = canary(Eager(), recipe)

    assert result.right, result.reason
    assert 0 < result.worst <= 1


def test_a_fault_in_the_kernel_of_one_size_is_caught_where_the_size_is_named() -> None:
    def few_rows(right: Fault, *call: Any) -> torch.Tensor:
        return right(*call) * (2 if call[-1].m <= 32 else 1)

    backend = Planted(few_rows)
    assert canary(backend).right
    backend.canary_sizes = ((20, 40, 144),)
    assert not canary(backend).right


def uninitialised_rest(
    right: Fault, x: Any, weights: Any, bias: Any, static: Any, routing: Routing, problem: Any
) -> torch.Tensor:
    out = right(x, weights, bias, static, routing, problem)
    out[~out.any(1)] = torch.nan
    return out


def next_expert(right: Fault, x: Any, weights: ExpertWeights, *rest: Any) -> torch.Tensor:
    return right(x, weights._replace(data=weights.data.roll(1, 0)), *rest)


def scale_of_first(right: Fault, x: Any, weights: ExpertWeights, *rest: Any) -> torch.Tensor:
    scale = weights.scale[:1].expand_as(weights.scale)
    return right(x, weights._replace(scale=scale), *rest)


def bias_of_first(
    right: Fault, x: Any, weights: Any, bias: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    return right(x, weights, None if bias is None else bias[:1].expand_as(bias), *rest)


def one_static_scale(
    right: Fault, x: Any, weights: Any, bias: Any, static: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    return right(x, weights, bias, None if static is None else static[:1].expand(5), *rest)


def ends_off_by_one(
    right: Fault, x: Any, weights: Any, bias: Any, static: Any, routing: Routing, problem: Any
) -> torch.Tensor:
    if routing.offsets is not None:
        routing = replace(routing, offsets=routing.offsets - 1)
    return right(x, weights, bias, static, routing, problem)


def scatter_ignored(
    right: Fault, x: Any, weights: Any, bias: Any, static: Any, routing: Routing, problem: Any
) -> torch.Tensor:
    return right(x, weights, bias, static, replace(routing, scatter=None), problem)


def changes_the_routing(
    right: Fault, x: Any, weights: Any, bias: Any, static: Any, routing: Routing, problem: Any
) -> torch.Tensor:
    out = right(x, weights, bias, static, routing, problem)
    if routing.offsets is not None:
        routing.offsets.sub_(1)
    return out


@pytest.mark.unpoisoned  # the canary itself leaves NaN in the memory of the output
@pytest.mark.parametrize(
    "fault",
    [
        uninitialised_rest,
        next_expert,
        scale_of_first,
        bias_of_first,
        one_static_scale,
        ends_off_by_one,
        scatter_ignored,
        changes_the_routing,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_fault_is_caught(fault: Fault) -> None:
    result = canary(Planted(fault))

    assert result.applicable
    assert not result.right, result.reason


def test_a_backend_that_takes_nothing_is_not_applicable() -> None:
    result = canary(Missing("cublaslt"))

    assert not result.applicable
    assert "cublaslt needs an expert matmul" in result.reason


def test_ways_that_a_backend_refuses_are_left_out() -> None:
    calls: list[ExpertsProblem] = []

    class Grouped(Eager):
        def refuse_call(self, problem: Any, machine: Any) -> list[Refusal]:
            return [Refusal("way", "sorted rows", "ids")] if problem.batched else []

        def experts(self, *call: Any) -> torch.Tensor:
            calls.append(call[-1])
            return super().experts(*call)

    result = canary(Grouped())

    assert result.right, result.reason
    assert calls
    assert not any(problem.batched for problem in calls)


@pytest.mark.parametrize("refused", [None, Accuracy.EXACT])
def test_each_class_of_accumulation_is_tested_where_it_is_offered(refused: Accuracy | None) -> None:
    calls: list[Accuracy] = []

    class Both(Eager):
        accuracies = frozenset(Accuracy)

        def refuse_call(self, problem: Any, machine: Any) -> list[Refusal]:
            return [Refusal("accuracy", "fast", "it")] if problem.accuracy is refused else []

        def experts(self, *call: Any) -> torch.Tensor:
            calls.append(call[-1].accuracy)
            return super().experts(*call)

    result = canary(Both())

    assert result.right, result.reason
    assert calls.count(Accuracy.FAST) == (1 if refused is None else len(calls))
    assert len(calls) > 5
