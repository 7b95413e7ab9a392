"""The same sentences through the fp32 model and through its FP8 copies."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from fp8dispatch import FP8Linear, convert_model
from fp8dispatch.demo.encoder import embed
from fp8dispatch.demo.report import BaselineRecord, RecipeRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8dispatch import ConversionReport

    Batch = dict[str, torch.Tensor]

RECIPES = ("block", "row", "tensor")
SKIP = ("lm_head", "pooler")
"""Not part of a mean-pooled embedding."""

_TIMED_ROUNDS = 5


@dataclass(frozen=True)
class Comparison:
    """What was measured, and what the LoRA steps go on with.

    Attributes:
        model: the unconverted model in the dtype that was asked for.
        reference: fp32 embeddings [S, H].
        baselines: the fp32 model and, where another dtype was asked for, the model in that dtype.
        recipes: one record for each recipe.
    """

    model: nn.Module
    reference: torch.Tensor
    baselines: tuple[BaselineRecord, ...]
    recipes: tuple[RecipeRecord, ...]


def compare(
    model: nn.Module, dtype: torch.dtype, batch: Batch, on_step: Callable[[str], None]
) -> Comparison:
    """Compare `model` (fp32) with its FP8 copies, all else of which is in `dtype`."""
    on_step("fp32")
    plain = [model]
    if dtype is not torch.float32:
        plain.append(copy.deepcopy(model).to(dtype))
    with torch.no_grad():
        embeddings = [embed(each, batch) for each in plain]
    reference = embeddings[0]

    converted: list[tuple[nn.Module, ConversionReport]] = []
    answers: list[tuple[tuple[str, ...], str]] = []
    for recipe in RECIPES:
        on_step(f"fp8 {recipe}")
        converted.append(convert(plain[-1], recipe))
        answers.append(chosen_backends(converted[-1][0], batch))
        with torch.no_grad():
            embeddings.append(embed(converted[-1][0], batch))

    on_step("timing")
    models = [*plain, *(each for each, _ in converted)]
    seconds = _seconds_per_pass(models, batch)
    cosines = [_cosines(each, reference) for each in embeddings]
    return Comparison(
        model=plain[-1],
        reference=reference,
        baselines=tuple(
            BaselineRecord(
                dtype=str(next(each.parameters()).dtype).removeprefix("torch."),
                worst_cosine=worst,
                mean_cosine=mean,
                seconds=time_,
            )
            for each, (worst, mean), time_ in zip(plain, cosines, seconds, strict=False)
        ),
        recipes=tuple(
            RecipeRecord(
                recipe=recipe,
                backends=backends,
                explanation=explanation,
                converted=len(report.converted),
                skipped=report.skipped,
                bytes_before=report.bytes_before,
                bytes_after=report.bytes_after,
                worst_cosine=worst,
                mean_cosine=mean,
                seconds=time_,
            )
            for recipe, (_, report), (backends, explanation), (worst, mean), time_ in zip(
                RECIPES,
                converted,
                answers,
                cosines[len(plain) :],
                seconds[len(plain) :],
                strict=True,
            )
        ),
    )


def convert(model: nn.Module, recipe: str) -> tuple[nn.Module, ConversionReport]:
    """A copy of `model` with FP8 linear layers; `model` itself is left alone."""
    copied = copy.deepcopy(model)
    return copied, convert_model(copied, recipe, skip=SKIP)


def fp8_linears(model: nn.Module) -> dict[str, FP8Linear]:
    """The FP8 linear layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}


def chosen_backends(model: nn.Module, batch: Batch) -> tuple[tuple[str, ...], str]:
    """The backends that this batch really reaches, and the explanation of the first layer.

    The model runs once; before each FP8 layer its true input is put to `explain`.
    """
    backends: dict[str, None] = {}
    explanations: list[str] = []

    def ask(layer: FP8Linear, args: tuple[torch.Tensor, ...]) -> None:
        decision = layer.explain(args[0])
        backends.setdefault(decision.backend)
        explanations.append(str(decision))

    hooks = [layer.register_forward_pre_hook(ask) for layer in fp8_linears(model).values()]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(backends), explanations[0] if explanations else ""


def _cosines(embeddings: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Worst and mean over the sentences; NaN anywhere makes both NaN."""
    cosines = F.cosine_similarity(embeddings.double(), reference.double(), dim=1)
    return cosines.min().item(), cosines.mean().item()


def _seconds_per_pass(models: Sequence[nn.Module], batch: Batch) -> list[float]:
    """Median time of each model's pass; the models take turns, so that they share disturbances."""
    cuda = batch["input_ids"].is_cuda
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for timed in range(_TIMED_ROUNDS + 1):  # the first round warms up
            for model, own in zip(models, times, strict=True):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                model(**batch)
                if cuda:
                    torch.cuda.synchronize()
                if timed:
                    own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]
