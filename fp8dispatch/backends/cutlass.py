"""Torch's CUTLASS kernels, which have expert matmuls alone: a linear layer is refused, and says so.

`fp8dispatch.moe.backends.cutlass` is the backend; this is its name among the linear ones, so that a
statement that names it is understood by both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8dispatch.backends.contract import Backend, Weight
from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem

if TYPE_CHECKING:
    import torch

    from fp8dispatch.quantization.activation import QuantizedActivation

_REFUSAL = Refusal("linear", "an expert matmul", "a linear layer")


class Cutlass(Backend):
    """Refuses every machine; never chosen, always explained."""

    name = "cutlass"
    weight_dtypes = frozenset()

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return (_REFUSAL,)

    def matmul(
        self,
        x: QuantizedActivation,
        weight: Weight,
        bias: torch.Tensor | None,
        problem: LinearProblem,
    ) -> torch.Tensor:
        raise BackendUnavailableError(f"{self.name} {_REFUSAL}")


BACKEND = Cutlass()
