"""Our own portable Triton kernels: every recipe, block size, format and ragged shape.

Where the GPU has no FP8 (below capability 8.9), or the format is FNUZ on NVIDIA hardware, the
kernels decode the bytes to fp16, which is exact, and multiply there.
"""

from __future__ import annotations

from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.errors import Refusal
from fp8dispatch.kernels.requirements import CAPABILITIES, MINIMUM_TRITON, refuse_machine
from fp8dispatch.machine import Machine
from fp8dispatch.problem import FLOAT8_NAMES


class Triton(Backend):
    """Triton kernels of `fp8dispatch.kernels`, fp32 promotion every 128 of K or sooner."""

    name = "triton"
    distribution = "triton"
    minimum_version = MINIMUM_TRITON
    capabilities = CAPABILITIES
    verified_capabilities = CAPABILITIES  # compiled on the spot for the device, accesses masked
    weight_dtypes = frozenset(FLOAT8_NAMES)
    quantizes_with_kernels = True  # also in the interpreter
    batch_invariant = True
    matmul = computed_in("fp8dispatch.backends.compute.triton")
    settled = computed_in("fp8dispatch.backends.compute.triton")
    tiles = computed_in("fp8dispatch.backends.compute.triton")

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return refuse_machine(machine)


BACKEND = Triton()
