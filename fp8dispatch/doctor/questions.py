"""The calls that a report asks about: those of the route tables, and that of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fp8dispatch.policy import Policy
from fp8dispatch.problem import ExpertsProblem, LinearProblem
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe, infer_recipe

RECIPES = (
    TENSOR,
    ROW,
    BLOCK_128,
    Recipe(Granularity.BLOCK, (1, 128)),
    Recipe(Granularity.BLOCK, (1, 32)),
)
ROWS = (1, 16, 256, 4096)
SHAPES = ((4096, 7168), (4100, 7000))
"""N and K of the route table: one that every kernel likes, and one that is ragged."""

EXPERTS, EXPERTS_SHAPE = 256, (4096, 7168)
"""Of the expert matmuls: gate and up of DeepSeek-V3, of which each token takes 8."""

EXPERTS_WAYS = ((True, 8), (True, 256), (False, 1024), (False, 8192))
"""Whether each row names its expert, and M: decoding 1 and 32 tokens, and two prompts."""

_FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class Call:
    """The one call to explain.

    Attributes:
        experts: E of an expert matmul; None for a linear layer.
        batched: each row names its expert; else rows come sorted by expert.
    """

    m: int
    n: int
    k: int
    recipe: Recipe
    experts: int | None = None
    batched: bool = False


def problem_of(call: Call, allowed: Policy) -> LinearProblem:
    """The call as the router sees it; its recipe is what such a scale would be read as."""
    shape = call.recipe.scale_shape(call.n, call.k)
    meant = infer_recipe((call.n, call.k), shape, call.recipe.block_size)
    if call.experts is None:
        return _linear(call.m, call.n, call.k, meant, allowed)
    return _experts(call.m, call.n, call.k, meant, allowed, call.experts, batched=call.batched)


def linear_problems(recipe: Recipe, allowed: Policy) -> Iterator[LinearProblem]:
    """Those of the route table for a recipe, the first of them aligned."""
    for n, k in SHAPES:
        for m in ROWS:
            yield _linear(m, n, k, recipe, allowed)


def expert_problems(recipe: Recipe, allowed: Policy) -> Iterator[ExpertsProblem]:
    """The same for expert matmuls."""
    for batched, m in EXPERTS_WAYS:
        yield _experts(m, *EXPERTS_SHAPE, recipe, allowed, EXPERTS, batched=batched)


def _linear(m: int, n: int, k: int, recipe: Recipe, allowed: Policy) -> LinearProblem:
    return LinearProblem(
        m,
        n,
        k,
        recipe,
        _FP8,
        _FP8,
        "bfloat16",
        accuracy=allowed.accuracy,
        batch_invariant=allowed.batch_invariant,
    )


def _experts(
    m: int, n: int, k: int, recipe: Recipe, allowed: Policy, experts: int, *, batched: bool
) -> ExpertsProblem:
    return ExpertsProblem(
        m,
        n,
        k,
        recipe,
        _FP8,
        _FP8,
        "bfloat16",
        accuracy=allowed.accuracy,
        batch_invariant=allowed.batch_invariant,
        experts=experts,
        batched=batched,
    )
