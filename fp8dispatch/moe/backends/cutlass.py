"""The grouped GEMM that torch carries: ``torch.nn.functional.scaled_grouped_mm``, per row.

CUTLASS kernels of torch's own, not cuBLASLt's, which has no grouped GEMM for FP8. Read in torch's
sources (GroupedBlas.cpp, ScaledGroupMM.cu, GroupMMCommon.cuh at 2.10 to 2.13), and run on an H200
with 2.11; with another torch its first run is in a child process.

* ``scaled_grouped_mm(xq, wq.transpose(1, 2), x_scale, RowWise, w_scale, RowWise, offs=ends)``: rows
  of one expert behind those of another, `x_scale` fp32 [rows], `w_scale` [E, N], `ends` int32 [E]:
  inclusive ends. Rows behind the last end are not written. It has no block recipe.
* N and K multiples of 16; then rows of an expert may begin anywhere, and an expert may have none.
  Ends that fall end in an assertion on the device, which loses the CUDA context: ours are made to
  rise.
* One thread of a block prepares each expert, and fewer than 1024 are taken.
* ``use_fast_accum=False``, the default, promotes partial sums; both classes are offered.
* Kernels for capability 9.0 only; torch also lets 10.0 call them, where they cannot run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.moe.backends.library import GroupedLibrary, refuse_grouped
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.recipe import Granularity

_MOST_EXPERTS = 1023


class Cutlass(GroupedLibrary):
    """``scaled_grouped_mm`` of torch with one scale for each row."""

    name = "cutlass"
    distribution = "torch"
    minimum_version = "2.10"
    capabilities = ((9, 0),)
    verified_capabilities: ClassVar[tuple[tuple[int, int], ...]] = ((9, 0),)
    verified_versions: ClassVar[Mapping[str, tuple[str, ...]]] = {"torch": ("2.11.0",)}
    recipes = frozenset({Granularity.TENSOR, Granularity.ROW})
    accuracies = frozenset({Accuracy.EXACT, Accuracy.FAST})
    align_n = 16
    align_k = 16
    experts = computed_in("fp8dispatch.moe.backends.compute.cutlass")

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        return refuse_grouped(problem, row_multiple=1, most_experts=_MOST_EXPERTS)


BACKEND = Cutlass()
