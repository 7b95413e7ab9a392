"""`warmup`: everything that a first call would do, done ahead of time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import nn

from fp8dispatch import policy, registry
from fp8dispatch.checks import check_choice, check_size
from fp8dispatch.errors import DTypeError, InvalidInputError
from fp8dispatch.explanation import sample_of
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.modules import FP8Linear
from fp8dispatch.moe.experts import FP8Experts
from fp8dispatch.prepare import prepared_bytes
from fp8dispatch.problem import Dgrad


@dataclass(frozen=True)
class WarmedLayer:
    """What warming one layer did.

    Attributes:
        name: the layer's name in the model.
        backends: tokens -> the backend that calls of this size take; of experts, which have
            several matmuls, the different ones joined by " + ".
        seconds: how long it took: probing, compiling, preparing; about 0 for a layer like one
            that was warmed before.
        extra_bytes: memory of what is prepared and kept for the layer's weight; with an FP8 dgrad
            the transposed weight is part of it, where the backend needs one.
    """

    name: str
    backends: dict[int, str]
    seconds: float
    extra_bytes: int


def warmup(
    model: nn.Module,
    tokens: Sequence[int] = (1, 8, 64, 2048),
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool | None = None,
) -> tuple[WarmedLayer, ...]:
    """Probe, compile, lay out and check for all FP8 layers of a model before it serves.

    Each layer runs once for each number of tokens, on random activations and without gradients;
    where ``dgrad="fp8"`` is stated it runs once more, and backward.
    Afterwards calls of these sizes neither probe nor synchronise, and may be captured into graphs.

    Args:
        model: any module that holds `FP8Linear` or `FP8Experts` layers, or one of them. Experts
            are warmed for tokens that choose their `top_k` at random.
        tokens: rows of activations to warm for.
        dtype: dtype of the activations: bfloat16, float16 or float32.
        progress: show a progress bar on stderr; None shows it on a terminal.

    Returns:
        One record for each layer, in the model's order.

    Raises:
        InvalidInputError: not a module, no such layer, tokens that are no positive integers.
        BackendUnavailableError: a layer that no backend takes.
    """
    if not isinstance(model, nn.Module):
        raise DTypeError(f"warmup needs a torch.nn.Module, found {type(model).__name__}")
    check_choice("dtype", dtype, ACTIVATION_DTYPES)
    for count in tokens:
        check_size("each of tokens", count)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (FP8Linear, FP8Experts))
    ]
    if not layers:
        raise InvalidInputError(
            f"warmup needs FP8Linear or FP8Experts layers, found none in "
            f"{type(model).__name__}; convert the model with fp8dispatch.convert_model"
        )
    console = Console(stderr=True, force_terminal=progress)
    with Progress(
        TextColumn("warming {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=len(layers))
        warmed = []
        for name, layer in layers:
            bar.update(task, description=name)
            warmed.append(_warm(name, layer, tokens, dtype))
            bar.advance(task)
    return tuple(warmed)


def _warm(
    name: str, layer: FP8Linear | FP8Experts, tokens: Sequence[int], dtype: torch.dtype
) -> WarmedLayer:
    device = layer.get_parameter(layer.frozen[0]).device
    start = time.perf_counter()
    backends = {}
    with torch.inference_mode():
        for count in tokens:
            x = sample_of(layer, count, dtype).normal_()
            _run(layer, x)
            explained = layer.explain(x)
            decisions = explained.values() if isinstance(explained, dict) else (explained,)
            backends[count] = " + ".join(dict.fromkeys(one.backend for one in decisions))
    if policy.resolve(layer.backend, registry.NAMES).dgrad is Dgrad.FP8:
        with torch.inference_mode(False), torch.enable_grad():
            for count in tokens:
                x = sample_of(layer, count, dtype).normal_().requires_grad_()
                torch.autograd.grad(_run(layer, x).sum(), x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    kept = [tensor for one in layer.frozen if (tensor := getattr(layer, one)) is not None]
    # Tensors over one memory, as a file may have them, keep what is prepared together.
    extra = sum({id(one.untyped_storage()): prepared_bytes(one) for one in kept}.values())
    return WarmedLayer(name, backends, time.perf_counter() - start, extra)


def _run(layer: FP8Linear | FP8Experts, x: torch.Tensor) -> torch.Tensor:
    """The layer on x; experts with a choice of experts at random."""
    out: torch.Tensor
    if isinstance(layer, FP8Linear):
        out = layer(x)
        return out
    scores = torch.rand(x.shape[0], layer.num_experts, device=x.device)
    weights, ids = scores.topk(min(layer.top_k, layer.num_experts), -1)
    out = layer(x, ids, weights)
    return out
