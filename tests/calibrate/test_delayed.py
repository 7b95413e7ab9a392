"""Delayed scaling: the window, the warm-up, freezing, seeds, and layers that follow it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fp8dispatch import DTypeError, FP8Linear, InvalidInputError, ShapeError
from fp8dispatch.calibrate.delayed import (
    DelayedScaling,
    attach_delayed_scaling,
    detach_delayed_scaling,
)
from fp8dispatch.calibrate.scales import AmaxSeed

E8M0 = torch.float8_e8m0fnu


def fp32(value: float) -> float:
    return torch.tensor(value).item()


def call(scaling: DelayedScaling, amax: float) -> float:
    """One call with inputs of this magnitude; the scale that it uses."""
    return float(scaling(torch.tensor([[amax, -amax / 2]])))


def window_scale(history: list[float], length: int, algorithm: str, margin: int) -> float:
    """TransformerEngine's rule, written out: history is newest first."""
    window = history[:length]
    amax = max(window) if algorithm == "max" else window[0]
    return fp32(fp32(amax) / 448) * 2.0**margin


@given(
    amaxes=st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=1, max_size=12),
    length=st.integers(1, 5),
    algorithm=st.sampled_from(["max", "most_recent"]),
    margin=st.integers(-2, 3),
)
def test_a_call_uses_the_window_of_the_calls_before(
    amaxes: list[float], length: int, algorithm: Any, margin: int
) -> None:
    scaling = DelayedScaling(history_length=length, algorithm=algorithm, margin=margin)
    seen: list[float] = []
    for amax in amaxes:
        used = call(scaling, amax)
        before = seen or [amax]  # the first call has only itself
        assert used == window_scale(before, length, algorithm, margin)
        seen.insert(0, amax)
    assert float(scaling.scale) == window_scale(seen, length, algorithm, margin)


def test_zeros_keep_the_scale_and_what_is_not_finite_is_dropped() -> None:
    scaling = DelayedScaling(history_length=2)
    call(scaling, 4.0)
    call(scaling, torch.inf)
    call(scaling, torch.nan)
    assert scaling.amax_history.tolist() == [4.0, 0.0]
    call(scaling, 0.0)
    call(scaling, 0.0)
    assert scaling.amax_history.tolist() == [0.0, 0.0]
    assert float(scaling.scale) == fp32(4 / 448), "an empty window says nothing"
    assert float(scaling(torch.empty(0, 4))) == fp32(4 / 448)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_follows_in_every_gradient_mode(mode: Any) -> None:
    """TransformerEngine's own stays at its first scale under inference mode."""
    scaling = DelayedScaling()
    with mode():
        call(scaling, 1.0)
        call(scaling, 8.0)
        assert call(scaling, 1.0) == fp32(8 / 448)


def test_it_freezes_when_it_is_warm_and_thaws_on_request() -> None:
    scaling = DelayedScaling(warmup_steps=50)
    for step in range(50):
        assert not scaling.frozen
        assert not scaling.warm
        call(scaling, 1.0 + step)
    assert scaling.warm
    assert scaling.frozen
    assert call(scaling, 1000.0) == fp32(50 / 448) == call(scaling, 1.0)

    scaling.unfreeze()
    assert call(scaling, 1000.0) == fp32(50 / 448), "it starts from what was frozen"
    assert call(scaling, 1.0) == fp32(1000 / 448)
    scaling.freeze()
    assert call(scaling, 1e6) == fp32(1000 / 448)


def test_it_can_be_left_to_follow_for_ever() -> None:
    scaling = DelayedScaling(freeze_when_warm=False, history_length=1)
    for _ in range(60):
        call(scaling, 1.0)
    assert scaling.warm
    call(scaling, 5.0)
    assert call(scaling, 1.0) == fp32(5 / 448)


@pytest.mark.parametrize("steps", [0, 49, 201, 50.0, True, "50"])
def test_the_warm_up_is_from_50_to_200_calls(steps: Any) -> None:
    with pytest.raises(InvalidInputError, match="from 50 to 200"):
        DelayedScaling(warmup_steps=steps)


def test_a_seed_is_the_window_before_the_first_call() -> None:
    scaling = DelayedScaling(history_length=2)
    scaling.seed(AmaxSeed((2.0, 8.0, 99.0), 99 / 448, 448 / 99))
    assert call(scaling, 1.0) == fp32(8 / 448)
    assert scaling.amax_history.tolist() == [1.0, 2.0]
    for wrong in ([], [-1.0], [torch.nan]):
        with pytest.raises(InvalidInputError, match="amax_seeds"):
            scaling.seed(wrong)


def test_its_state_is_saved_and_its_window_stays_fp32() -> None:
    scaling = DelayedScaling(history_length=3)
    for amax in (1.0, 7.3, 2.0):
        call(scaling, amax)
    again = DelayedScaling(history_length=3)
    again.load_state_dict(scaling.state_dict())
    for other in (again, copy.deepcopy(scaling)):
        assert other.steps == 3
        assert call(other, 1.0) == fp32(fp32(7.3) / 448)
    half = copy.deepcopy(scaling).half()
    assert half.amax_history.dtype == half.scale.dtype == torch.float32
    assert float(half.scale) == float(scaling.scale)


def model(scale_dtype: torch.dtype = torch.float32) -> nn.Module:
    one = torch.ones(1).to(scale_dtype)
    static = FP8Linear.from_linear(nn.Linear(16, 8), "row", activation_scale=one)
    return nn.Sequential(static, nn.ReLU(), FP8Linear.from_linear(nn.Linear(8, 4), "row"))


def test_layers_follow_their_inputs_until_they_are_frozen() -> None:
    net = model()
    attached = attach_delayed_scaling(net, history_length=4)
    assert list(attached) == ["0"], "a layer with dynamic activations has no scale to set"
    scaling, layer = attached["0"], net[0]
    x = torch.ones(3, 16)

    net(x)
    assert float(layer.activation_scale) == fp32(1 / 448)
    net(x * 4)
    assert float(layer.activation_scale) == fp32(1 / 448), "delayed by a call"
    net(x)
    assert float(layer.activation_scale) == fp32(4 / 448)
    scaling.freeze()
    before = net(x)
    version = layer.activation_scale._version
    net(x * 100)
    assert torch.equal(net(x), before), "frozen: the same numbers every time"
    assert layer.activation_scale._version == version, "and nothing is written"
    scaling.unfreeze()
    net(x * 9)
    net(x)
    assert float(layer.activation_scale) == fp32(9 / 448)
    scaling.freeze()
    net(x)
    detach_delayed_scaling(net)
    net(x * 50)
    assert float(layer.activation_scale) == fp32(9 / 448)
    assert set(net.state_dict()) == set(model().state_dict())


def test_the_last_scale_of_the_warm_up_reaches_the_layer() -> None:
    net = model()
    (scaling,) = attach_delayed_scaling(net, history_length=1).values()
    x = torch.ones(1, 16)
    for step in range(50):
        net(x * (step + 1))
    assert scaling.frozen
    net(x)
    assert float(net[0].activation_scale) == fp32(50 / 448)


def test_seeds_are_given_to_their_layers() -> None:
    net = model()
    attach_delayed_scaling(net, {"0": AmaxSeed((6.0,), 6 / 448, 448 / 6)})
    net(torch.ones(1, 16))
    assert float(net[0].activation_scale) == fp32(6 / 448)


def test_a_power_of_two_scale_stays_one() -> None:
    net = model(E8M0)
    attach_delayed_scaling(net)
    net(torch.full((1, 16), 3.0))
    assert net[0].activation_scale.dtype == E8M0
    assert float(net[0].activation_scale.float()) == 2.0**-7, "the next above 3 / 448"


def test_what_does_not_fit_is_refused() -> None:
    net = model()
    seed = {"2": AmaxSeed((1.0,), 1.0, 1.0)}
    with pytest.raises(InvalidInputError, match="found seeds of 2, which are none"):
        attach_delayed_scaling(net, seed)
    with pytest.raises(InvalidInputError, match="found none"):
        attach_delayed_scaling(nn.Linear(2, 2))
    attach_delayed_scaling(net)
    with pytest.raises(InvalidInputError, match="'0', which has it already"):
        attach_delayed_scaling(net)
    with pytest.raises(InvalidInputError, match="'most_recent'"):
        DelayedScaling(algorithm="mean")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="octaves"):
        DelayedScaling(margin=99)
    with pytest.raises(ShapeError, match="history_length"):
        DelayedScaling(history_length=0)
    with pytest.raises(DTypeError, match="dtype"):
        DelayedScaling(dtype=torch.int8)
    with pytest.raises(DTypeError, match="found float64"):
        DelayedScaling()(torch.ones(1).double())
