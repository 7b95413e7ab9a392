"""The grouped GEMMs of FBGEMM's GenAI kernels and of MSLK; see the linear's module for both.

Read in their sources (f8f8bf16_groupwise_grouped and f8f8bf16_rowwise_grouped of FBGEMM 1.4 to 1.6
and MSLK 1.1); FBGEMM 1.6.0 has run on an H200, and of others the first run is in a child process.
Both take ``(xq, wq, x_scale, w_scale, M_sizes)``: `xq` [P, K], the rows of one
expert behind those of another, `wq` [E, N, K], ``M_sizes`` int64 [E] on the device. Neither looks
at scales, strides or FP8 dtypes, so everything is checked here.

* ``f8f8bf16_groupwise_grouped``: 1x128 activation groups and 128x128 weight blocks. The scales of
  an expert's rows are a block of their own, [K / 128, M_sizes[e]], the one behind the other: not
  one matrix over all rows. Those of the weight are [E, K / 128, N / 128]; where N is no multiple of
  128, the library finds those of the second expert in the wrong place. Exact accumulation.
* ``f8f8bf16_rowwise_grouped_stacked``: `x_scale` [P], `w_scale` [E, N]. Every kernel of it
  accumulates over all of K in the tensor core, so it runs only where the policy allows `fast`.
* One thread of a block prepares each expert, so there are at most 1024. Sizes may be zero, and may
  leave places at the end, which are not written. Rows are padded to 16 for each expert, so that
  every pointer that the library makes is a multiple of 16 bytes.
* Capability 9.0 only: elsewhere the block kernel returns without computing, and which of the
  releases have kernels for 10.0 is not known well enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.fbgemm_family import (
    FbgemmFamily,
    refuse_device,
    refuse_group_columns,
)
from fp8dispatch.backends.library import refuse_block
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.moe.backends.library import GroupedLibrary, refuse_grouped
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.recipe import Granularity, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

GROUPED_BLOCKS, GROUPED_ROWS = "f8f8bf16_groupwise_grouped", "f8f8bf16_rowwise_grouped_stacked"
ROW_MULTIPLE = 16
MOST_EXPERTS = 1024
_BLOCK_COLUMNS = 128


class FbgemmFamilyExperts(GroupedLibrary):
    """Grouped GEMMs of one of the two libraries, which the linear's backend finds and loads."""

    linear: ClassVar[FbgemmFamily]
    capabilities: ClassVar[tuple[tuple[int, int], ...]] = ((9, 0),)
    accuracies = frozenset({Accuracy.EXACT, Accuracy.FAST})
    align_n = 8
    align_k = 16
    experts = computed_in("fp8dispatch.moe.backends.compute.fbgemm_family")

    def __init__(self) -> None:
        self._operators: dict[str, Callable[..., torch.Tensor] | None] = {}

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        installation = self.linear.refuse_installation(machine)
        return (*installation, *refuse_device(machine, self.capabilities))

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals = refuse_grouped(problem, row_multiple=ROW_MULTIPLE, most_experts=MOST_EXPERTS)
        if problem.recipe.granularity is Granularity.BLOCK:
            refusals += refuse_block(problem)
            refusals += refuse_group_columns(problem)
            if problem.n % _BLOCK_COLUMNS:
                need = f"N a multiple of {_BLOCK_COLUMNS} with block scales"
                refusals.append(Refusal("align-n", need, f"N={problem.n}"))
        elif problem.accuracy is Accuracy.EXACT:
            need = "a policy that allows fast accumulation with per-row and per-tensor scales"
            refusals.append(Refusal("accuracy", need, "exact"))
        # The release that brought the one of them; what the other took before was not read.
        since = self.linear.block_since
        return [*refusals, *self.linear.refuse_older(machine, since, "for its grouped GEMMs")]

    def loadable(self, recipe: Recipe) -> tuple[Refusal, ...]:
        refused = self.linear.imported()
        if refused or self.operator(recipe) is not None:
            return refused
        need = f"a CUDA kernel of torch.ops.{self.linear.namespace}.{_name(recipe)}"
        return (Refusal("operator", need, f"none after importing {self.linear.module}"),)

    def operator(self, recipe: Recipe) -> Callable[..., torch.Tensor] | None:
        """The operator of a recipe, once the library is imported; None where there is none."""
        name = _name(recipe)
        if name not in self._operators:
            from fp8dispatch.backends.compute.operators import cuda_operator

            self._operators[name] = cuda_operator(self.linear.namespace, name)
        return self._operators[name]


def _name(recipe: Recipe) -> str:
    return GROUPED_BLOCKS if recipe.granularity is Granularity.BLOCK else GROUPED_ROWS
