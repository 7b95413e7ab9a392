"""`explain`: which backend runs, and why, for one call or for every layer of a model."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import nn

from fp8dispatch import linear
from fp8dispatch.checks import check_choice, check_size
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.modules import FP8Linear
from fp8dispatch.moe.experts import FP8Experts
from fp8dispatch.router import Decision


@overload
def explain(
    X: nn.Module,
    *,
    tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    dgrad: bool | None = None,
) -> dict[str, Decision]: ...


@overload
def explain(
    X: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, *rest: Any, **options: Any
) -> Decision: ...


def explain(
    X: torch.Tensor | nn.Module,
    *call: Any,
    tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    dgrad: bool | None = None,
    **options: Any,
) -> Decision | dict[str, Decision]:
    """Which backend `fp8_linear` would run, and why not the others.

    Nothing of the call is computed; a backend that is about to be chosen and was never tested here
    runs its canary first. A decision renders as text with ``str`` and as JSON with ``as_json``.

    Args:
        X: the activations of a call, or a model that holds `FP8Linear` or `FP8Experts` layers.
        call: the other arguments of `fp8_linear`, for a call.
        tokens: rows of activations to explain a model for.
        dtype: dtype of the activations to explain a model for.
        dgrad: also say how dX is computed; None does so for a call that records a gradient of X.
        options: the keyword arguments of `fp8_linear`, for a call.

    Returns:
        The decision for the call; for a model, layer name -> decision, in the model's order.
        Experts have one for each projection, such as ``"layers.0.mlp.experts.down_proj"``, for
        their `top_k`.

    Raises:
        The errors of `fp8_linear`; InvalidInputError also for a model without such a layer, or
        with arguments of a call.
    """
    if not isinstance(X, nn.Module):
        return linear.explain(X, *call, dgrad=dgrad, **options)
    if call or options:
        raise InvalidInputError(
            "a model is explained with tokens= and dtype= alone, found arguments of a call; "
            "explain a layer's call with layer.explain(x)"
        )
    check_size("tokens", tokens)
    check_choice("dtype", dtype, ACTIVATION_DTYPES)
    decisions: dict[str, Decision] = {}
    for name, layer in X.named_modules():
        if isinstance(layer, FP8Linear):
            decisions[name] = layer.explain(sample_of(layer, tokens, dtype), dgrad=dgrad)
        elif isinstance(layer, FP8Experts):
            prefix = f"{name}." if name else ""
            explained = layer.explain(sample_of(layer, tokens, dtype), dgrad=dgrad)
            decisions |= {f"{prefix}{one}": decision for one, decision in explained.items()}
    if not decisions:
        raise InvalidInputError(
            f"explain needs FP8Linear or FP8Experts layers, found none in {type(X).__name__}; "
            f"convert the model with fp8dispatch.convert_model"
        )
    return decisions


def sample_of(layer: FP8Linear | FP8Experts, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Activations of a layer's shape and device, with no particular values."""
    if isinstance(layer, FP8Linear):
        return torch.empty((tokens, layer.in_features), dtype=dtype, device=layer.weight.device)
    return torch.empty((tokens, layer.hidden_size), dtype=dtype, device=layer.down_proj.device)
