"""Fused experts of other libraries, recognised and quantised into `FP8Experts`.

Transformers keeps the experts of a layer in one module with three-dimensional weights, and says
in attributes what they mean (`has_gate`, `is_transposed`, ...). What lies between the matmuls is a
method of the module, which may compute anything: it is tried on numbers, and a module whose gate
is none of ours is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fp8dispatch.errors import InvalidInputError
from fp8dispatch.moe.activations import FUNCTIONS, ExpertActivation
from fp8dispatch.moe.experts import BIAS, DOWN, FP8Experts
from fp8dispatch.recipe import Recipe

DECLARED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_PROBE_COLUMNS = 64


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in one parameter."""
    if isinstance(module, FP8Experts):
        return False
    down = module._parameters.get(DOWN)
    return down is not None and down.dim() == 3


def why_left_alone(module: nn.Module) -> str | None:
    """Why the experts of a module cannot become `FP8Experts` without changing what they compute;
    None where they can."""
    missing = [name for name in DECLARED if not hasattr(module, name)]
    if missing:
        return f"its class ({type(module).__name__}) does not declare {', '.join(missing)}"
    if getattr(module, "has_post_expert_norm", False):
        return "it has a norm behind each expert"
    names = _tensors(module)
    held = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if held - set(names):
        return f"it holds {', '.join(sorted(held - set(names)))}, for which FP8Experts has no place"
    if set(names) - held:
        return f"it has no {', '.join(sorted(set(names) - held))}"
    tensors = [getattr(module, name) for name in names]
    if any(hasattr(tensor, "to_local") for tensor in tensors):
        return "its weights are distributed tensors"
    if not all(
        tensor.dtype in (torch.bfloat16, torch.float16, torch.float32) for tensor in tensors
    ):
        return f"its weights are {tensors[0].dtype}, not unquantised"
    if getattr(module, DOWN).numel() == 0:
        return "an empty weight"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "hooks are registered on it, which a replacement would lose"
    if _activation(module) is None:
        return "what it computes between its two matmuls is no activation of FP8Experts"
    return None


def convert_experts(
    module: nn.Module,
    recipe: str | Recipe,
    *,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    backend: str | None,
) -> FP8Experts:
    """The FP8 form of experts for which `why_left_alone` gives None; biases are shared where
    their layout allows it.

    Raises:
        InvalidInputError, NumericalOverflowError: as `quantize_experts`.
    """
    found = _activation(module)
    if found is None:
        raise InvalidInputError(f"{type(module).__name__} cannot be converted; ask why_left_alone")
    activation, interleaved = found
    config = getattr(module, "config", None)
    tensors = {}
    for name in _tensors(module):
        tensor = getattr(module, name)
        if not name.endswith(BIAS):
            tensor = tensor.detach()
            tensor = tensor.transpose(1, 2) if module.is_transposed else tensor
        if interleaved and name.startswith("gate_up_proj"):
            # The rows of gate and up take turns; ours come one after the other.
            trained = tensor.requires_grad
            tensor = torch.cat([tensor.detach()[:, ::2], tensor.detach()[:, 1::2]], 1)
            tensor.requires_grad_(trained)
        tensors[name] = tensor
    return FP8Experts.from_weights(
        tensors,
        recipe,
        dtype=dtype,
        scale_dtype=scale_dtype,
        activation=activation,
        top_k=getattr(config, "num_experts_per_tok", None) or 1,
        backend=backend,
    )


def activation_of(module: nn.Module) -> ExpertActivation:
    """What experts for which `why_left_alone` gives None compute between their matmuls.

    Raises:
        InvalidInputError: it is no activation of `FP8Experts`.
    """
    found = _activation(module)
    if found is None:
        raise InvalidInputError(f"{type(module).__name__} cannot be converted; ask why_left_alone")
    return found[0]


def _tensors(module: nn.Module) -> tuple[str, ...]:
    names = ("gate_up_proj" if module.has_gate else "up_proj", DOWN)
    return (*names, *(f"{name}{BIAS}" for name in names if module.has_bias))


def _activation(module: Any) -> tuple[ExpertActivation, bool] | None:
    """What a module computes between its matmuls, and whether gate and up take turns.

    The candidates are every function, with the limits and alphas that the module or its
    configuration holds; the one whose numbers agree is it.
    """
    gated = bool(module.has_gate)
    compute: Callable[[torch.Tensor], torch.Tensor] | None = getattr(
        module, "_apply_gate" if gated else "act_fn", None
    )
    if compute is None:
        return None
    owners = (module, getattr(module, "config", None))
    limits = _numbers(owners, ("limit", "swiglu_limit")) if gated else [None]
    alphas = _numbers(owners, ("alpha", "swiglu_alpha")) if gated else [None]
    reach = 2 * max([5.0, *(limit for limit in limits if limit is not None)])
    probe = torch.linspace(-reach, reach, 2 * _PROBE_COLUMNS, dtype=torch.float32)
    order = torch.randperm(probe.numel(), generator=torch.Generator().manual_seed(0))
    rows = torch.stack([probe, probe[order], probe / 8])
    with torch.no_grad():
        expected = compute(rows.clone())
        for interleaved in (False, True) if gated else (False,):
            halves = torch.cat([rows[:, ::2], rows[:, 1::2]], 1) if interleaved else rows
            for limit in limits:
                for alpha in alphas:
                    for name in FUNCTIONS if alpha is None else ("silu",):
                        candidate = ExpertActivation(name, limit, alpha, gated)
                        got = candidate(halves)
                        if got.shape == expected.shape and torch.allclose(
                            got, expected, 1e-5, 1e-6
                        ):
                            return candidate, interleaved
    return None


def _numbers(owners: tuple[object, ...], names: tuple[str, ...]) -> list[float | None]:
    """None, and the positive numbers that the owners hold under these names."""
    held = (getattr(owner, name, None) for owner in owners for name in names)
    found = {float(value) for value in held if isinstance(value, (int, float)) and value > 0}
    return [None, *sorted(found)]
