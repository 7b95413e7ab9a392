"""Transformers' FP8 experts on this library, each way in behind a call that one makes oneself.

* `register_experts`: ``experts_implementation="fp8dispatch"`` for models that Transformers
  quantised, in `from_pretrained` or `set_experts_implementation`.
* `provide_kernel`: this library in place of the hub kernel ``finegrained-fp8``, for Transformers'
  own FP8 linears and expert implementations.

Importing this module changes nothing. Models that are not quantised yet are converted with
`fp8dispatch.convert_model`, which needs neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from fp8dispatch.errors import BackendUnavailableError, DTypeError, InvalidInputError
from fp8dispatch.integrations.finegrained_fp8 import matmul_2d, matmul_batched, matmul_grouped
from fp8dispatch.moe.forward import Projection, experts_forward, has_halves

NAME = "fp8dispatch"
_KERNEL = {
    "matmul": matmul_2d,
    "batched_matmul": matmul_batched,
    "grouped_matmul": matmul_grouped,
}


def register_experts(name: str = NAME) -> None:
    """Make ``experts_implementation=name`` run FP8 experts on this library.

    It stands for every FP8 experts module of Transformers: dynamic and static activations, all
    block sizes, gated or not, expert parallelism. The model's own gate (its activation, limit
    and alpha) is called for what is between the two matmuls.

    Args:
        name: what to call it; a name that Transformers or somebody else has is refused.

    Raises:
        BackendUnavailableError: Transformers is missing or has no FP8 experts to plug into.
        InvalidInputError: the name is taken.
    """
    found = getattr(_finegrained(), "ALL_FP8_EXPERTS_FUNCTIONS", None)
    if found is None or not hasattr(found, "register"):
        raise BackendUnavailableError(
            f"registering experts needs the table ALL_FP8_EXPERTS_FUNCTIONS of Transformers 5, "
            f"found none in {_version()}; convert the model with fp8dispatch.convert_model instead"
        )
    if name in found and found[name] is not run_experts:
        raise InvalidInputError(
            f"name must be free, found {name!r} registered for {found[name]}; choose another"
        )
    found.register(name, run_experts)


def provide_kernel() -> None:
    """Give Transformers this library where it would download the hub kernel ``finegrained-fp8``.

    Its FP8 linears, and its experts with ``"batched_mm"`` and ``"grouped_mm"``, then run here,
    also on machines where the kernel would not. DeepGEMM, which Transformers prefers where it has
    it, is not touched: ``TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR=1`` turns it off there.

    Raises:
        BackendUnavailableError: Transformers is missing or holds the kernel in another way.
    """
    module = _finegrained()
    holder = getattr(module, "FineGrainedFP8", None)
    loader, kept = "_load_finegrained_fp8_kernel", "_FINEGRAINED_FP8"
    fields = set() if holder is None else {field.name for field in dataclasses.fields(holder)}
    if holder is None or fields != set(_KERNEL) or not hasattr(module, loader):
        raise BackendUnavailableError(
            f"providing the kernel needs FineGrainedFP8({', '.join(_KERNEL)}) and {loader}, as "
            f"Transformers 5.14 to 5.23 has them, found other ones in {_version()}; convert the "
            f"model with fp8dispatch.convert_model instead"
        )
    kernel = holder(**_KERNEL)
    if hasattr(module, kept):  # in a global of the module
        setattr(module, kept, kernel)
    else:  # in the cache of the loader
        setattr(module, loader, lambda: kernel)


def run_experts(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The forward pass of one of Transformers' ``FP8Experts``: [T, H] in, [T, H] out.

    Args:
        experts: the module: its weights, scales, ``block_size``, gate and activation scales.
        hidden_states: [T, H].
        top_k_index, top_k_weights: [T, k]; ids from the number of experts on, which expert
            parallelism gives to tokens of other ranks, add nothing and take no gradient.

    Raises:
        InvalidInputError: tensors that do not fit together, or experts that are not FP8.
        AmbiguousRecipeError: a gate_up scale that can be read in two ways; state it with
            ``experts.split_scales = True`` or ``False``.
    """
    if getattr(experts, "has_post_expert_norm", False):
        raise InvalidInputError(
            f"fp8dispatch runs experts without a norm behind each, found one in "
            f"{type(experts).__name__}; choose another experts_implementation"
        )
    gated = experts.has_gate
    block = experts.block_size
    into = "gate_up_proj" if gated else "up_proj"
    up = _projection(experts, into, "gate_up_proj", block)
    parts: Sequence[Projection] = (up,)
    if gated and getattr(experts, "is_concatenated", True):
        stated = getattr(experts, "split_scales", None)
        if has_halves(up.weight, up.scale, block, stated):
            parts = up.halves()

    def activation(*outputs: torch.Tensor) -> torch.Tensor:
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        active: torch.Tensor = experts._apply_gate(joined) if gated else experts.act_fn(joined)
        return active

    out = experts_forward(
        hidden_states,
        top_k_index,
        top_k_weights,
        parts,
        activation,
        _projection(experts, "down_proj", "down_proj", block),
    )
    return out.to(hidden_states.dtype)


def _projection(
    experts: Any, name: str, scale_of: str, block_size: Sequence[int] | None
) -> Projection:
    weight, scale = _local(getattr(experts, name)), _local(getattr(experts, f"{name}_scale_inv"))
    if weight.dtype in (torch.int8, torch.uint8):
        raise DTypeError(
            f"{name} must be FP8, found {weight.dtype} as packed FP4 has it; choose another "
            f"experts_implementation for FP4 experts"
        )
    if weight.element_size() > 1:
        raise DTypeError(
            f"{name} must be FP8, found {weight.dtype}: Transformers leaves weights as they are "
            f"whose sizes its block size does not divide; quantise the model with "
            f"fp8dispatch.convert_model, which takes them"
        )
    static = None
    if experts.activation_scheme == "static":
        static = _local(getattr(experts, f"{scale_of}_activation_scale"))
    bias = getattr(experts, f"{name}_bias", None)
    return Projection(weight, scale, None if bias is None else _local(bias), static, block_size)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a distributed tensor; any other as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    part: torch.Tensor = to_local()
    return part


def _finegrained() -> ModuleType:
    try:
        return import_module("transformers.integrations.finegrained_fp8")
    except ImportError as error:
        raise BackendUnavailableError(
            f"plugging into Transformers needs its integrations.finegrained_fp8, found "
            f"{type(error).__name__}: {error}; install transformers 5 or later"
        ) from error


def _version() -> str:
    return f"transformers {import_module('transformers').__version__}"
