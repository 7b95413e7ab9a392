"""The canary: does a backend compute the right numbers on this device?

A backend runs a few small calls that are made to fail where such code goes wrong: see
`linear_numerics` and `experts_numerics` for the calls, `known_operands` for what is multiplied and
`judgement` for what counts as right.
"""

from __future__ import annotations

import torch

from fp8dispatch.backends.contract import Backend, Capability
from fp8dispatch.moe.backends.contract import ExpertBackend
from fp8dispatch.probes.experts_numerics import run_experts_canary
from fp8dispatch.probes.judgement import CanaryResult, judge
from fp8dispatch.probes.known_operands import poison, synchronize
from fp8dispatch.probes.linear_numerics import run_linear_canary
from fp8dispatch.recipe import Recipe

__all__ = ["CanaryResult", "judge", "poison", "run_canary", "synchronize"]


@torch.no_grad()
def run_canary(backend: Capability, device: torch.device, recipe: Recipe) -> CanaryResult:
    """Run a backend on known operands and compare its numbers with the truth.

    Waits for the device. The global random number generators, autocast and the backend's
    operands are left as they are.

    Args:
        backend: where it refuses the machine or every call, the result is not applicable.
        device: where the operands lie; it is not made the current device.
        recipe: the recipe to vouch for.

    Raises:
        TypeError: it is neither a backend of linears nor of expert matmuls.
        Exception: whatever the backend raises; the caller knows what that means.
    """
    if isinstance(backend, Backend):
        return run_linear_canary(backend, device, recipe)
    if isinstance(backend, ExpertBackend):
        return run_experts_canary(backend, device, recipe)
    raise TypeError(
        f"{backend.name} needs to be a Backend or an ExpertBackend, found "
        f"{type(backend).__name__}; derive it from one of them"
    )
