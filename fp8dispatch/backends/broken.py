"""What stands in for a third-party backend that did not load: it refuses, with the error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8dispatch.backends.contract import Backend, Weight
from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem

if TYPE_CHECKING:
    import torch

    from fp8dispatch.quantization.activation import QuantizedActivation


class Broken(Backend):
    """Refuses every machine; never chosen, always explained.

    Args:
        name: the entry point's name.
        source: what the entry point names, ``module:attribute``.
        reason: what went wrong.
    """

    weight_dtypes = frozenset()

    def __init__(self, name: str, source: str, reason: str) -> None:
        self.name = name  # type: ignore[misc]  # each instance stands for another plugin
        self._refusal = Refusal("plugin", f"a backend at {source}", reason)

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return (self._refusal,)

    def matmul(
        self,
        x: QuantizedActivation,
        weight: Weight,
        bias: torch.Tensor | None,
        problem: LinearProblem,
    ) -> torch.Tensor:
        raise BackendUnavailableError(f"{self.name} {self._refusal}")
