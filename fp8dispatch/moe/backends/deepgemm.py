"""DeepGEMM's grouped GEMMs: 1x128 groups, 128x128 blocks, bf16 output; see the linear's module.

Two layouts of the distribution that `fp8dispatch.backends.deepgemm` describes, chosen by the call
(`masked_rows`). In both `b` is [E, N, K] and contiguous, `sb` [E, ceil(N / 128), ceil(K / 128)].

* Contiguous, ``m_grouped_fp8_gemm_nt_contiguous((a, sa), (b, sb), out, m_indices)``: ``m_indices``
  says the expert of each row of `a`. A tile of 128 rows belongs to one expert, so each expert's
  rows begin at a multiple of 128; places without a row say -1.
* Masked, ``fp8_m_grouped_gemm_nt_masked((a, sa), (b, sb), out, masked_m, expected_m)``: `a`
  [E, R, K] holds the rows of each expert in a block of its own, of which the first ``masked_m[e]``
  count, and tiles without rows are not computed. For few rows in any order: every expert must have
  room for all of them, so memory grows with E x R, and R is a multiple of the largest tile, since
  a tile that overhangs is written into the next expert's rows (deepseek-ai/DeepGEMM#268).
  ``expected_m`` only picks the kernel, so it comes from shapes.

Both have run on an H200 with the release that the linear's module names. A tile's expert is taken
from its first row (`moe.aligned`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from fp8dispatch.backends.deepgemm import BACKEND as LINEAR
from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.library import GROUP, Warmed, refuse_block
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.moe.backends.library import GroupedLibrary, refuse_grouped
from fp8dispatch.problem import ExpertsProblem, LinearProblem
from fp8dispatch.recipe import Granularity, Recipe, ceil_div

CONTIGUOUS, MASKED = "m_grouped_fp8_gemm_nt_contiguous", "fp8_m_grouped_gemm_nt_masked"
TILE_ROWS = 128

MOST_MASKED_BYTES = 2**30
"""Memory that the masked layout may take in a call: operands, scales and output of all places."""


class DeepGemm(GroupedLibrary):
    """The grouped GEMMs of DeepGEMM as SGLang packages it."""

    name = "deepgemm"
    capabilities = LINEAR.capabilities
    recipes = frozenset({Granularity.BLOCK})
    align_n = LINEAR.align_n
    align_k = LINEAR.align_k
    distributions = LINEAR.distributions
    verified_capabilities = LINEAR.verified_capabilities
    verified_versions = LINEAR.verified_versions
    experts = computed_in("fp8dispatch.moe.backends.compute.deepgemm")

    def __init__(self) -> None:
        self.warmed = Warmed(f"{self.name} (experts)", "may compile a kernel")

    def toolchain(self) -> Mapping[str, str]:
        return LINEAR.toolchain()

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return LINEAR.refuse_machine(machine)

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        return refuse_grouped(problem, row_multiple=TILE_ROWS) + refuse_block(problem)

    def loadable(self, recipe: Recipe) -> tuple[Refusal, ...]:
        refused = LINEAR.loadable(recipe)
        if refused:
            return refused
        library = import_module("deep_gemm")
        return tuple(
            Refusal("entry", f"deep_gemm.{entry}", "none")
            for entry in (CONTIGUOUS, MASKED)
            if not hasattr(library, entry)
        )


def masked_rows(problem: ExpertsProblem) -> int | None:
    """Places of each expert in the masked layout; None where the call takes the contiguous one.

    Masked are batched calls, whose rows come in any order, while all places together need at most
    `MOST_MASKED_BYTES`.
    """
    rows = ceil_div(problem.m, TILE_ROWS) * TILE_ROWS
    each = problem.k + 4 * ceil_div(problem.k, GROUP) + 2 * problem.n
    fits = problem.experts * rows * each <= MOST_MASKED_BYTES
    return rows if problem.batched and fits else None


BACKEND = DeepGemm()
