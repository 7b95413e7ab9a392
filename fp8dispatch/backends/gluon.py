"""Our own kernels for Hopper, written in Gluon, Triton's lower level: nothing else is needed.

Weights per row, per tensor, or in blocks whose sides are multiples of 128, with exact accumulation
in every recipe; any M and N, a fused bias of any float dtype, and bf16, fp16 or fp32 output. Bulk
copies (TMA) move the operands, so the rows of both start at multiples of 16 bytes: K is a multiple
of 16. The tensor cores multiply e4m3fn activations by e4m3fn or e5m2 weights, and know no FNUZ.

Refused, and the portable kernels' to take: a side of a block below 128 would need several scales
in one partial sum of 128 of K: for groups of 1x128 a vector for the columns (32 more registers of
the 17 that "wide" has left, and a second multiplication for each element), for blocks of 64 or 32
of K two or four times the promotions.

Which kernel takes a call is `fp8dispatch.kernels.hopper_config`'s to say. The kernels and what was
measured on their prototypes are described in `fp8dispatch.kernels.hopper_gemm` and
`hopper_decode`; which Triton they are compiled for in `gluon_compat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import ClassVar

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.library import LibraryBackend
from fp8dispatch.errors import Refusal
from fp8dispatch.kernels.requirements import GLUON_TRITON, refuse_gluon
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem


class Gluon(LibraryBackend):
    """The Gluon kernels of `fp8dispatch.kernels`, fp32 promotion every 128 of K."""

    name = "gluon"
    distribution = "triton"
    minimum_version = GLUON_TRITON[0]
    capabilities = ((9, 0),)
    verified_capabilities: ClassVar[tuple[tuple[int, int], ...]] = ((9, 0),)
    verified_versions: ClassVar[Mapping[str, tuple[str, ...]]] = {"triton": ("3.6.0",)}
    weight_dtypes = frozenset({"float8_e4m3fn", "float8_e5m2"})
    out_dtypes = frozenset({"bfloat16", "float16", "float32"})
    align_k = 16
    canary_sizes = (  # the canary's own take narrow tiles
        (5, 264, 1280),  # decode, K shared by two programs
        (33, 200, 272),  # decode, K no multiple of 128
        (130, 201, 272),  # narrow, stored without TMA, K no multiple of 128
        (130, 72, 3840),  # narrow, K shared by two programs
        (130, 4288, 144),  # square
        (130, 8585, 144),  # square, stored without TMA, more tiles than an H100 has SMs
        (130, 26112, 144),  # wide, the same
    )
    needs_to_load = "triton.experimental.gluon to import"
    linear = computed_in("fp8dispatch.backends.compute.gluon")
    matmul = computed_in("fp8dispatch.backends.compute.gluon")
    multiply = computed_in("fp8dispatch.backends.compute.gluon")
    settled = computed_in("fp8dispatch.backends.compute.gluon")

    def __init__(self) -> None:
        super().__init__()
        self._kernels: ModuleType | None = None

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return refuse_gluon(machine)

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals: list[Refusal] = []
        block = problem.recipe.block_size
        if block is not None and any(
            size % 128 and size < whole
            for size, whole in zip(block, (problem.n, problem.k), strict=True)
        ):
            need = "blocks whose sides are multiples of 128 (or all of N or K)"
            refusals.append(Refusal("block-size", need, str(problem.recipe)))
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
