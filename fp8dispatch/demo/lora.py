"""Two LoRA steps on frozen FP8 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from fp8dispatch.demo.compare import convert, fp8_linears
from fp8dispatch.demo.encoder import embed
from fp8dispatch.demo.report import LoraRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8dispatch import FP8Linear

RANK = 8
_ATTENTION_INPUTS = frozenset({"query", "value", "q_proj", "v_proj", "q", "v"})
_LEARNING_RATE = 2e-3
_TEMPERATURE = 0.2
_SEED = 20


class LoraLinear(nn.Module):
    """A frozen FP8 linear plus a trained update of low rank: ``base(x) + (x @ a.T) @ b.T``.

    Args:
        base: the FP8 layer; its weight, scale and bias stay as they are.
        rank: columns of the update's bottleneck.
    """

    def __init__(self, base: FP8Linear, rank: int = RANK) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        # b starts at zero: before the first step the layer computes what its base computes.
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to ``x`` [..., K]."""
        update = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        result: torch.Tensor = self.base(x) + update
        return result


def attach(model: nn.Module) -> dict[str, LoraLinear]:
    """Wrap the query and value layers of `model`, or all FP8 layers where none has such a name."""
    linears = fp8_linears(model)
    chosen = {
        name: layer for name, layer in linears.items() if name.split(".")[-1] in _ATTENTION_INPUTS
    }
    adapters = {}
    for name, layer in (chosen or linears).items():
        parent, _, child = name.rpartition(".")
        adapters[name] = LoraLinear(layer)
        setattr(model.get_submodule(parent), child, adapters[name])
    return adapters


def fine_tune(
    model: nn.Module,
    recipe: str,
    batch: dict[str, torch.Tensor],
    reference: torch.Tensor,
    on_step: Callable[[str], None],
) -> LoraRecord:
    """Convert a copy of `model`, train its adapters for two steps and report the loss.

    The loss is contrastive: each FP8 embedding has to find the fp32 embedding of its own sentence
    in `reference` [S, H] among those of all sentences.
    """
    torch.manual_seed(_SEED)
    tuned, _ = convert(model, recipe)
    tuned.requires_grad_(False)
    adapters = attach(tuned)
    frozen = {name: _bytes_of(layer) for name, layer in fp8_linears(tuned).items()}
    parameters = [p for adapter in adapters.values() for p in (adapter.a, adapter.b)]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)

    losses = []
    for step in ("before", "after step 1"):
        on_step(f"LoRA, {step}")
        loss = _loss(tuned, batch, reference)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    on_step("LoRA, after step 2")
    with torch.no_grad():
        losses.append(_loss(tuned, batch, reference).item())

    with_gradient = {id(p) for p in tuned.parameters() if p.grad is not None}
    unchanged = all(
        torch.equal(_bytes_of(layer), frozen[name]) for name, layer in fp8_linears(tuned).items()
    )
    return LoraRecord(
        recipe=recipe,
        rank=RANK,
        adapted=len(adapters),
        trained_parameters=sum(p.numel() for p in parameters),
        losses=(losses[0], losses[1], losses[2]),
        only_adapters_got_gradients=with_gradient == {id(p) for p in parameters},
        weights_unchanged=unchanged,
    )


def _loss(
    model: nn.Module, batch: dict[str, torch.Tensor], reference: torch.Tensor
) -> torch.Tensor:
    logits = embed(model, batch) @ reference.t() / _TEMPERATURE  # [S, S]
    own = torch.arange(len(reference), device=reference.device)
    return F.cross_entropy(logits, own)


def _bytes_of(layer: FP8Linear) -> torch.Tensor:
    return layer.weight.detach().view(torch.uint8).clone()
