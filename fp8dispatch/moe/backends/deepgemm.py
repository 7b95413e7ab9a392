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

from collections.abc import Callable, Mapping
from importlib import import_module

import torch

from fp8dispatch.backends.compute.operands import on_device
from fp8dispatch.backends.deepgemm import BACKEND as LINEAR
from fp8dispatch.backends.library import (
    GROUP,
    Warmed,
    refuse_block,
    refuse_operands,
)
from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.moe.aligned import align_rows
from fp8dispatch.moe.backends.contract import ExpertBackend, ExpertWeights
from fp8dispatch.moe.routing import Routing
from fp8dispatch.problem import ExpertsProblem, LinearProblem
from fp8dispatch.quantization import dynamic
from fp8dispatch.recipe import Granularity, Recipe, ceil_div

_ENTRY = "m_grouped_fp8_gemm_nt_contiguous"
_TILE_ROWS = 128
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

    def __init__(self) -> None:
        self._warmed = Warmed(f"{self.name} (experts)", "may compile a kernel")

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
        places = problem.m + problem.experts * _TILE_ROWS
        if places * max(problem.n, problem.k) >= _MOST_ELEMENTS:
            need = "padded rows below 2**31 elements (32-bit offsets)"
            found = f"{places} rows of {max(problem.n, problem.k)}"
            refusals.append(Refusal("size", need, found))
        return refusals

    def loadable(self, recipe: Recipe) -> tuple[Refusal, ...]:
        refused = LINEAR.loadable(recipe)
        if not refused and not hasattr(import_module("deep_gemm"), _ENTRY):
            return (Refusal("entry", f"deep_gemm.{_ENTRY}", "none"),)
        return refused

    def experts(
        self,
        x: torch.Tensor,
        weights: ExpertWeights,
        bias: torch.Tensor | None,
        activation_scale: torch.Tensor | None,
        routing: Routing,
        problem: ExpertsProblem,
    ) -> torch.Tensor:
        reasons = self.loadable(weights.recipe)
        if reasons:
            told = "; ".join(f"{self.name} {reason}" for reason in reasons)
            raise BackendUnavailableError(f"{told}; exclude it or repair the installation")
        gemm: Callable[..., None] = getattr(import_module("deep_gemm"), _ENTRY)
        n, k, rows = problem.n, problem.k, routing.rows
        static = None if activation_scale is None else activation_scale[:1]
        data, scale = dynamic.quantize(x, GROUP, torch.float8_e4m3fn, static)
        places = align_rows(routing.sort(use_kernels=x.is_cuda), routing.inputs, _TILE_ROWS)
        count = places.expert.shape[0]
        out = torch.zeros((rows + 1, n), dtype=torch.bfloat16, device=x.device)
        if routing.inputs == 0:
            return out[:rows]
        # Bytes are indexed, since torch has no indexing for every FP8 dtype everywhere.
        placed = data.view(torch.uint8)[places.source].view(data.dtype)
        groups = ceil_div(k, GROUP)
        placed_scale = torch.empty((groups, count), dtype=torch.float32, device=x.device).t()
        placed_scale.copy_(scale.expand(data.shape[0], groups)[places.source])
        computed = torch.empty((count, n), dtype=torch.bfloat16, device=x.device)

        def call() -> torch.Tensor:
            gemm(
                (placed, placed_scale),
                (weights.data, weights.scale),
                computed,
                places.expert,
                disable_ue8m0_cast=True,
            )
            return computed

        with on_device(x):
            self._warmed.run((count, n, k), x.device, call)
        # Places without a row go to one row more than there are, which is not returned.
        out.index_copy_(0, places.target, computed)
        return out[:rows]


BACKEND = DeepGemm()
