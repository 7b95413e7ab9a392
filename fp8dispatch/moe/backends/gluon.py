"""Our own grouped kernel for Hopper, written in Gluon: prefill, many rows for each expert.

e4m3fn weights in 128x128 blocks, per row or per tensor, exact accumulation in every recipe, any E
and N, a bias of any float dtype, bf16, fp16 or fp32 output; K is a multiple of 16, as bulk copies
want it. Rows are gathered, quantised and sorted in one launch, and go from the multiplication to
where they belong. It takes decode calls too, and is not made for them: a tile holds 128 rows of one
expert. `fp8dispatch.kernels.hopper_experts` describes the kernel.

Run on an H200 with Triton 3.6; with another Triton its first run is in a child process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.gluon import BACKEND as LINEAR
from fp8dispatch.errors import Refusal
from fp8dispatch.kernels.hopper_experts_config import LONGEST_ROW
from fp8dispatch.kernels.requirements import refuse_gluon
from fp8dispatch.machine import Machine
from fp8dispatch.moe.backends.contract import ExpertBackend
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128, Granularity, Recipe


class Gluon(ExpertBackend):
    """`fp8dispatch.kernels.hopper_experts`, fp32 promotion every 128 of K."""

    name = "gluon"
    distribution = LINEAR.distribution
    minimum_version = LINEAR.minimum_version
    capabilities = LINEAR.capabilities
    verified_capabilities: ClassVar[tuple[tuple[int, int], ...]] = ((9, 0),)
    verified_versions: ClassVar[Mapping[str, tuple[str, ...]]] = {"triton": ("3.6.0",)}
    weight_dtypes = frozenset({"float8_e4m3fn"})
    align_k = 16
    experts = computed_in("fp8dispatch.moe.backends.compute.gluon")

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return refuse_gluon(machine)

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals: list[Refusal] = []
        if problem.recipe.granularity is Granularity.BLOCK and problem.recipe != BLOCK_128:
            refusals.append(Refusal("block-size", "blocks 128x128", str(problem.recipe)))
        if not problem.weight_row_major:
            refusals.append(Refusal("layout", "row-major weights [E, N, K]", "other strides"))
        if not problem.aligned:
            need = "weight memory and rows aligned to 16 bytes"
            refusals.append(Refusal("alignment", need, "an odd address or row stride"))
        whole_rows = problem.recipe.granularity is not Granularity.BLOCK
        if whole_rows and not problem.static_activation and problem.k > LONGEST_ROW:
            need = f"K up to {LONGEST_ROW} where a row has one computed scale"
            refusals.append(Refusal("size", need, f"K={problem.k}"))
        return refusals

    def loadable(self, recipe: Recipe) -> tuple[Refusal, ...]:
        return LINEAR.loadable(recipe)


BACKEND = Gluon()
