"""`warmup` does ahead of time what a first call would do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fp8dispatch import FP8Linear, InvalidInputError, convert_model, decide, prepare
from fp8dispatch.errors import BackendUnavailableError, DTypeError, ShapeError
from fp8dispatch.warm import warmup


@pytest.fixture
def model(device: str) -> nn.Module:
    layers = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16, bias=False))
    convert_model(layers, "row")
    return layers.to(device)


def test_every_layer_is_reported_in_order_with_what_it_will_run(model: nn.Module) -> None:
    warmed = warmup(model, [1, 8])

    assert [layer.name for layer in warmed] == ["0", "2"]
    for layer in warmed:
        assert set(layer.backends) == {1, 8}
        assert layer.seconds >= 0
        assert layer.extra_bytes >= 16 * 4, "at least the checked fp32 scale of 16 rows"


def test_a_warm_layer_decides_and_checks_nothing_more(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    warmup(model, [1, 8], dtype=torch.bfloat16)
    monkeypatch.setattr(prepare, "_check_values", None)  # a check would now raise TypeError
    before = copy.copy(decide.stats())

    for tokens in (1, 8):
        model(torch.randn(tokens, 48, dtype=torch.bfloat16, device=device))

    assert decide.stats()["cold_decisions"] == before["cold_decisions"]


def test_a_single_layer_can_be_warmed() -> None:
    layer = FP8Linear.from_linear(nn.Linear(48, 32))

    (warmed,) = warmup(layer, [3])

    assert warmed.name == ""
    assert set(warmed.backends) == {3}


def test_nothing_is_drawn_where_there_is_no_terminal(
    model: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    warmup(model, [1])
    assert capfd.readouterr() == ("", "")
    warmup(model, [1], progress=True)
    assert "warming" in capfd.readouterr().err


def test_what_cannot_be_warmed_is_refused() -> None:
    layer = FP8Linear.from_linear(nn.Linear(48, 32))
    with pytest.raises(DTypeError, match="found dict"):
        warmup({})  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="found none in Linear"):
        warmup(nn.Linear(4, 4))
    with pytest.raises(ShapeError, match="found 0"):
        warmup(layer, [0])
    with pytest.raises(DTypeError, match="dtype"):
        warmup(layer, [1], dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match="cublaslt"):
        warmup(FP8Linear.from_linear(nn.Linear(48, 32), backend="cublaslt").cpu(), [1])
