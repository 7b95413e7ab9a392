"""What the expert backends over other people's grouped GEMMs share."""

from __future__ import annotations

from fp8dispatch.backends.library import refuse_operands
from fp8dispatch.errors import Refusal
from fp8dispatch.moe.backends.contract import ExpertBackend
from fp8dispatch.problem import ExpertsProblem, LinearProblem
from fp8dispatch.recipe import Granularity

_MOST_ELEMENTS = 2**31


class GroupedLibrary(ExpertBackend):
    """A grouped GEMM of e4m3fn operands that writes bf16, adds no bias and wants rows in places.

    Quantised rows are copied to their places in the call, and results back: copies that our own
    kernels do not need.
    """

    weight_dtypes = frozenset({"float8_e4m3fn"})
    out_dtypes = frozenset({"bfloat16"})


def refuse_grouped(
    problem: LinearProblem, *, row_multiple: int, most_experts: int | None = None
) -> list[Refusal]:
    """Refusals that such GEMMs have in common; those of block recipes are `refuse_block`'s.

    Args:
        row_multiple: rows of each expert are padded to a multiple of this.
        most_experts: how many experts the library can take in one call; None for any number.
    """
    refusals = refuse_operands(problem, contiguous=True)
    if problem.has_bias and problem.recipe.granularity is not Granularity.BLOCK:
        need = (
            "no bias (added to its bfloat16 product it would be rounded twice: use a backend that "
            "fuses it, or add it outside)"
        )
        refusals.append(Refusal("bias", need, "one"))
    if not isinstance(problem, ExpertsProblem):
        return refusals
    if problem.static_per_expert:
        need = "one activation scale for all experts, or none"
        refusals.append(Refusal("static", need, f"{problem.experts} of them"))
    if most_experts is not None and problem.experts > most_experts:
        need = f"at most {most_experts} experts (one thread of a block prepares each)"
        refusals.append(Refusal("experts", need, f"{problem.experts}"))
    places = problem.m + problem.experts * (row_multiple - 1)
    if places * max(problem.n, problem.k) >= _MOST_ELEMENTS:
        need = "padded rows below 2**31 elements (32-bit offsets)"
        found = f"{places} rows of {max(problem.n, problem.k)}"
        refusals.append(Refusal("size", need, found))
    return refusals
