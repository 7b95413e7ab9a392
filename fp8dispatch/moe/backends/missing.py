"""What stands for a backend of linear layers that has no expert matmul: it refuses, and says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.moe.backends.contract import ExpertBackend, ExpertWeights
from fp8dispatch.problem import ExpertsProblem

if TYPE_CHECKING:
    import torch

    from fp8dispatch.moe.routing import Routing


class Missing(ExpertBackend):
    """Refuses every machine; never chosen, always explained.

    Args:
        name: the backend's name.
    """

    weight_dtypes = frozenset()

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]  # each instance stands for another backend
        self._refusal = Refusal("experts", "an expert matmul", "linear layers only")

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return (self._refusal,)

    def experts(
        self,
        x: torch.Tensor,
        weights: ExpertWeights,
        bias: torch.Tensor | None,
        activation_scale: torch.Tensor | None,
        routing: Routing,
        problem: ExpertsProblem,
    ) -> torch.Tensor:
        raise BackendUnavailableError(f"{self.name} {self._refusal}")
