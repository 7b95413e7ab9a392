"""FP8 weights under unquantised activations (W8A16), on any GPU that runs our Triton kernels.

The weight's codes are widened to bf16, fp16 or fp32 in registers, which is exact, and multiplied
there; scales are applied to fp32 partial sums. So activations lose nothing, and GPUs without FP8
instructions are served alike. The multiplication runs at 16-bit speed at best: what it saves are
the weight's bytes.

Its numbers are not those of the other backends, which quantise activations, so nobody gets it
unasked. Activations that come quantised are multiplied as the backend `triton` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.triton import Triton
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem

if TYPE_CHECKING:
    import torch

    from fp8dispatch.backends.contract import Weight


class WeightOnly(Triton):
    """The scaled GEMM of `fp8dispatch.kernels` over activations as they are."""

    name = "weight_only"
    opt_in = (
        "it leaves activations unquantised, which gives other numbers than FP8 activations, at the "
        "speed of 16-bit multiplication"
    )
    quantizes_activations = False
    linear = computed_in("fp8dispatch.backends.compute.weight_only")

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        if problem.static_activation:
            need = "activations without a scale, since it does not quantise them"
            return [Refusal("static", need, "one static activation scale")]
        return []

    def settled(
        self,
        weight: Weight,
        activation_scale: torch.Tensor | None,
        problem: LinearProblem,
        device: torch.device,
    ) -> None:
        """Nothing: the ready launches of `triton` quantise the activations."""


BACKEND = WeightOnly()
