"""`explain` answers for a call and for every layer of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fp8dispatch
from fp8dispatch.errors import DTypeError, InvalidInputError, ShapeError


@pytest.fixture
def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16))
    fp8dispatch.convert_model(layers, "row")
    return layers


def test_a_model_is_explained_layer_by_layer(model: nn.Module) -> None:
    decisions = fp8dispatch.explain(model, tokens=7, dtype=torch.float16)

    assert list(decisions) == ["0", "2"]
    assert [(d.problem.n, d.problem.k) for d in decisions.values()] == [(32, 48), (16, 32)]
    for decision in decisions.values():
        assert (decision.problem.m, decision.problem.out_dtype) == (7, "float16")
        assert decision.problem.has_bias


def test_a_call_is_explained_as_it_would_be_made(model: nn.Module) -> None:
    layer = model[0]  # type: ignore[index]
    x = torch.randn(3, 48)

    decision = fp8dispatch.explain(
        x, layer.weight, layer.weight_scale, layer.bias, out_dtype=torch.float16, backend="eager"
    )

    assert decision.decided_by == "argument backend="
    assert decision.problem.out_dtype == "float16"
    assert decision.backend == "eager"


def test_what_cannot_be_explained_is_refused(model: nn.Module) -> None:
    with pytest.raises(InvalidInputError, match="found none in Linear"):
        fp8dispatch.explain(nn.Linear(4, 4))
    with pytest.raises(InvalidInputError, match=r"layer\.explain"):
        fp8dispatch.explain(model, torch.ones(2))  # type: ignore[call-overload]
    with pytest.raises(ShapeError, match=r"tokens .* found 0"):
        fp8dispatch.explain(model, tokens=0)
    with pytest.raises(DTypeError, match="dtype"):
        fp8dispatch.explain(model, dtype=torch.int8)
