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


def test_a_call_that_records_a_gradient_says_how_it_is_computed(model: nn.Module) -> None:
    layer = model[0]  # type: ignore[index]
    x = torch.randn(3, 48, dtype=torch.float16)
    trained = x.clone().requires_grad_()

    assert layer.explain(x).gradient is None
    with torch.no_grad():
        assert layer.explain(trained).gradient is None
    usual = layer.explain(trained)
    assert usual.dgrad is None
    assert usual.gradient == "through the dequantised weight in float16, by strips and torch.mm"
    assert f"dX: {usual.gradient}" in str(usual)
    assert layer.explain(x, dgrad=True) == usual
    assert layer.explain(trained, dgrad=False).gradient is None


def test_an_fp8_dgrad_has_a_decision_of_its_own(model: nn.Module) -> None:
    layer = model[0]  # type: ignore[index]
    x = torch.randn(3, 48, dtype=torch.float16, requires_grad=True)
    with fp8dispatch.use_backend(dgrad="fp8"):
        decision = fp8dispatch.explain(x, layer.weight, layer.weight_scale)
        explained = fp8dispatch.explain(model, tokens=3, dtype=torch.float16, dgrad=True)

    assert decision.dgrad is not None
    problem = decision.dgrad.problem
    assert (problem.m, problem.n, problem.k, problem.gradient) == (3, 48, 32, True)
    assert (problem.out_dtype, str(problem.recipe)) == ("float16", "tensor")
    assert f"dX: as an FP8 GEMM, by {decision.dgrad.backend}" in str(decision)
    assert str(problem) in str(decision)
    told = decision.as_dict()
    assert told["gradient"] == decision.gradient
    assert told["dgrad"]["backend"] == decision.dgrad.backend
    assert explained["0"].dgrad == decision.dgrad


def test_a_weight_without_an_fp8_dgrad_is_told_as_it_would_be_called() -> None:
    weight, scale = fp8dispatch.quantize(torch.randn(32, 64), "block", block_size=(1, 32))
    x = torch.randn(3, 64, requires_grad=True)
    with fp8dispatch.use_backend(dgrad="fp8"):
        with pytest.raises(fp8dispatch.BackendUnavailableError, match="found groups"):
            fp8dispatch.explain(x, weight, scale)
        assert fp8dispatch.explain(x.detach(), weight, scale).gradient is None
