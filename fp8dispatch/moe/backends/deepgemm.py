"""DeepGEMM's grouped GEMM in its contiguous layout: 1x128 groups, 128x128 blocks, bf16 output.

``m_grouped_fp8_gemm_nt_contiguous((a, sa), (b, sb), out, m_indices, disable_ue8m0_cast=True)``
of the distribution that `fp8dispatch.backends.deepgemm` describes: `b` is [E, N, K] and
contiguous, `sb` [E, N / 128, K / 128], and ``m_indices`` says the expert of each row of `a`. A
tile of 128 rows belongs to one expert, so each expert's rows begin at a multiple of 128; places
without a row say -1, and nothing is written there.

Quantised rows are copied to their places in the call, and results back: a copy of FP8 rows each
way that our own kernels do not need. Read in DeepGEMM's sources and never run on a GPU by us:
it stands behind our own kernels, and its first run is in a child process.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from fp8dispatch.backends.deepgemm import BACKEND as LINEAR
from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.library import (
    Warmed,
    refuse_block,
    refuse_operands,
)
from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.moe.backends.contract import ExpertBackend
from fp8dispatch.problem import ExpertsProblem, LinearProblem
from fp8dispatch.recipe import Granularity, Recipe

ENTRY = "m_grouped_fp8_gemm_nt_contiguous"
TILE_ROWS = 128
_MOST_ELEMENTS = 2**31


class DeepGemm(ExpertBackend):
    """``m_grouped_fp8_gemm_nt_contiguous`` of DeepGEMM as SGLang packages it."""

    name = "deepgemm"
    capabilities = LINEAR.capabilities
    recipes = frozenset({Granularity.BLOCK})
    weight_dtypes = LINEAR.weight_dtypes
    out_dtypes = LINEAR.out_dtypes
    align_n = LINEAR.align_n
    align_k = LINEAR.align_k
    distributions = LINEAR.distributions
    experts = computed_in("fp8dispatch.moe.backends.compute.deepgemm")

    def __init__(self) -> None:
        self.warmed = Warmed(f"{self.name} (experts)", "may compile a kernel")

    def toolchain(self) -> Mapping[str, str]:
        return LINEAR.toolchain()

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return LINEAR.refuse_machine(machine)

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals = refuse_operands(problem, contiguous=True) + refuse_block(problem)
        if not isinstance(problem, ExpertsProblem):
            return refusals
        if problem.static_per_expert:
            need = "one activation scale for all experts, or none"
            refusals.append(Refusal("static", need, f"{problem.experts} of them"))
        places = problem.m + problem.experts * TILE_ROWS
        if places * max(problem.n, problem.k) >= _MOST_ELEMENTS:
            need = "padded rows below 2**31 elements (32-bit offsets)"
            found = f"{places} rows of {max(problem.n, problem.k)}"
            refusals.append(Refusal("size", need, found))
        return refusals

    def loadable(self, recipe: Recipe) -> tuple[Refusal, ...]:
        refused = LINEAR.loadable(recipe)
        if not refused and not hasattr(import_module("deep_gemm"), ENTRY):
            return (Refusal("entry", f"deep_gemm.{ENTRY}", "none"),)
        return refused

    def require(self, recipe: Recipe) -> None:
        """Load the library.

        Raises:
            BackendUnavailableError: with the refusals of `loadable`.
        """
        reasons = self.loadable(recipe)
        if reasons:
            told = "; ".join(f"{self.name} {reason}" for reason in reasons)
            raise BackendUnavailableError(f"{told}; exclude it or repair the installation")


BACKEND = DeepGemm()
