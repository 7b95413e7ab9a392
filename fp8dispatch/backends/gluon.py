"""Our own kernels for Hopper, written in Gluon, Triton's lower level: nothing else is needed.

e4m3fn weights in 128x128 blocks, per row or per tensor, with exact accumulation in every recipe;
any M and N, a fused bias of any float dtype, and bf16, fp16 or fp32 output. Bulk copies (TMA) move
the operands, so the rows of both start at multiples of 16 bytes: K is a multiple of 16.

Which kernel takes a call is `fp8dispatch.kernels.hopper_config`'s to say. The kernels and what was
measured on their prototypes are described in `fp8dispatch.kernels.hopper_gemm` and
`hopper_decode`; which Triton they are compiled for in `gluon_compat`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.library import LibraryBackend
from fp8dispatch.errors import Refusal
from fp8dispatch.kernels.requirements import GLUON_TRITON, refuse_gluon
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128, Granularity


class Gluon(LibraryBackend):
    """The Gluon kernels of `fp8dispatch.kernels`, fp32 promotion every 128 of K."""

    name = "gluon"
    distribution = "triton"
    minimum_version = GLUON_TRITON[0]
    capabilities = ((9, 0),)
    verified_capabilities = ()  # not run on a GPU yet: its first run is in a child process
    out_dtypes = frozenset({"bfloat16", "float16", "float32"})
    align_k = 16
    needs_to_load = "triton.experimental.gluon to import"
    linear = computed_in("fp8dispatch.backends.compute.gluon")
    matmul = computed_in("fp8dispatch.backends.compute.gluon")
    multiply = computed_in("fp8dispatch.backends.compute.gluon")

    def __init__(self) -> None:
        super().__init__()
        self._kernels: ModuleType | None = None

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return refuse_gluon(machine)

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals: list[Refusal] = []
        if problem.recipe.granularity is Granularity.BLOCK and problem.recipe != BLOCK_128:
            refusals.append(Refusal("block-size", "blocks 128x128", str(problem.recipe)))
        if not problem.weight_row_major:
            refusals.append(Refusal("layout", "a row-major weight [N, K]", "other strides"))
        if not problem.aligned:
            need = "weight memory and rows aligned to 16 bytes"
            refusals.append(Refusal("alignment", need, "an odd address or row stride"))
        return refusals

    def _load(self) -> tuple[Refusal, ...]:
        self._kernels = import_module("fp8dispatch.kernels.hopper_launch")
        return ()


BACKEND = Gluon()
