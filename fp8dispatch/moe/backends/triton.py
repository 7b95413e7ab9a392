"""Our own portable Triton kernels: every recipe, block size, format, routing and ragged shape.

Beside the multiplication one launch quantises the rows where they lie. Sorted rows take another,
which counts tiles; rows that name their expert, if they are more than a few, one more, which sorts
them. None waits for the device, and all depend on shapes alone.
"""

from __future__ import annotations

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.errors import Refusal
from fp8dispatch.kernels.requirements import CAPABILITIES, MINIMUM_TRITON, refuse_machine
from fp8dispatch.machine import Machine
from fp8dispatch.moe.backends.contract import ExpertBackend
from fp8dispatch.problem import FLOAT8_NAMES


class Triton(ExpertBackend):
    """`fp8dispatch.kernels.experts_gemm`, fp32 promotion every 128 of K or sooner."""

    name = "triton"
    distribution = "triton"
    minimum_version = MINIMUM_TRITON
    capabilities = CAPABILITIES
    verified_capabilities = CAPABILITIES  # compiled on the spot for the device, accesses masked
    weight_dtypes = frozenset(FLOAT8_NAMES)
    experts = computed_in("fp8dispatch.moe.backends.compute.triton")

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return refuse_machine(machine)


BACKEND = Triton()
