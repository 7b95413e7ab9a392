"""Watching a model: what is counted is what its layers were given, without padding."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fp8dispatch
from fp8dispatch.calibrate.magnitudes import Magnitudes
from fp8dispatch.calibrate.observe import Calibrator
from fp8dispatch.calibrate.scales import activation_scales, kv_cache_scales, unobserved
from fp8dispatch.calibrate.stats import ModuleRecord, record_of
from fp8dispatch.errors import CalibrationError, DTypeError, InvalidInputError, ShapeError
from tests.calibrate.models import HIDDEN, VOCABULARY, Toy, llama, mixtral

if TYPE_CHECKING:
    from collections.abc import Callable

LINEARS = [f"attention.{part}_proj" for part in "qkvo"] + ["unused"]


def same(record: ModuleRecord, x: torch.Tensor) -> bool:
    """Whether a record counts exactly the values of `x`."""
    expected = record_of(Magnitudes.of(x), x.shape[-1], record.calls, record.amax_history)
    return record.model_copy(update={"unmasked_calls": 0}) == expected


def test_inputs_of_every_linear_layer_are_counted(device: str) -> None:
    model = Toy().to(device)
    calls = [torch.randn(2, 3, HIDDEN, device=device) for _ in range(3)]

    with Calibrator(model) as calibrator:
        for x in calls:
            model(x)
    stats = calibrator.stats()

    assert list(stats.modules) == LINEARS
    normed = torch.cat([model.norm(x) for x in calls])
    for part in "qkv":
        record = stats.modules[f"attention.{part}_proj"]
        assert same(record, normed), "the input after the norm"
        assert record.calls == 3
        newest = [float(model.norm(x).detach().abs().max()) for x in calls]
        assert record.amax_history == pytest.approx(newest)
    assert stats.modules["unused"].calls == 0
    assert unobserved(stats).layers == ("unused",)
    assert "unused" not in activation_scales(stats)


def test_nothing_is_left_on_the_model() -> None:
    model, x = Toy(), torch.randn(1, 2, HIDDEN)
    before = model(x)

    with Calibrator(model) as calibrator:
        assert torch.equal(model(x), before), "watching changes nothing"
    model(x)

    assert calibrator.stats().modules["attention.q_proj"].calls == 1
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    with calibrator:
        model(x)
    assert calibrator.stats().modules["attention.q_proj"].calls == 2, "it may go on"


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode_is_watched(grad: Callable[[], Any]) -> None:
    model, x = Toy(), torch.randn(1, 2, HIDDEN)
    with grad(), Calibrator(model) as calibrator:
        model(x)
        model(x * 2)
    assert calibrator.stats().modules["attention.o_proj"].calls == 2


def test_padding_does_not_count(device: str) -> None:
    model = Toy().to(device)
    x = torch.randn(2, 4, HIDDEN, device=device)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], device=device)
    x[mask == 0] = 1000.0

    with Calibrator(model) as calibrator:
        model(x, attention_mask=mask)
    by_argument = calibrator.stats().modules
    with Calibrator(model) as calibrator, calibrator.masked(mask):
        model(x)
    by_context = calibrator.stats().modules

    normed = model.norm(x)[mask == 1]
    assert same(by_argument["attention.q_proj"], normed)
    assert by_argument == by_context
    assert by_argument["attention.o_proj"].unmasked_calls == 0


def test_a_mask_holds_for_its_call_alone() -> None:
    model, x = Toy(), torch.randn(2, 4, HIDDEN)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    with Calibrator(model) as calibrator:
        model(x, attention_mask=mask)
        model(x)
    assert calibrator.stats().modules["attention.q_proj"].values == (3 + 8) * HIDDEN


def test_flat_inputs_are_masked_and_others_said() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.some = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            flat = self.flat(x.reshape(-1, 4))
            out: torch.Tensor = self.some(flat[:3])  # as an expert sees a few tokens
            return out

    model, x = Flat(), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with Calibrator(model) as calibrator:
        model(x, attention_mask=mask)
        model(x, attention_mask=torch.ones_like(mask))
    records = calibrator.stats().modules

    assert records["flat"].values == (3 + 6) * 4
    assert (records["flat"].unmasked_calls, records["some"].unmasked_calls) == (0, 1)


@pytest.mark.parametrize("with_mask", [False, True])
def test_first_tokens_can_be_left_out(with_mask: bool) -> None:
    model, x = Toy(), torch.randn(2, 4, HIDDEN)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])  # padded on the left
    arguments = {"attention_mask": mask} if with_mask else {}
    with Calibrator(model, exclude_first_tokens=1) as calibrator:
        model(x, **arguments)

    counted = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1] if with_mask else [0, 1, 1, 1]]) == 1
    assert same(calibrator.stats().modules["attention.q_proj"], model.norm(x)[counted])


def test_a_tensor_that_changes_between_two_layers_is_seen_anew() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.first(x)
            x.mul_(2)
            out: torch.Tensor = self.second(x)
            return out

    with torch.no_grad(), Calibrator(model := Changing()) as calibrator:
        model(torch.ones(1, 4))
    records = calibrator.stats().modules
    assert (records["first"].amax, records["second"].amax) == (1.0, 2.0)


def test_layers_called_by_name_and_layers_in_fp8_are_watched() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), fp8dispatch.FP8Linear.from_linear(nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.b(self.a(input=x))
            return out

    with Calibrator(model := Named()) as calibrator:
        model(torch.ones(1, 4))
    assert [record.calls for record in calibrator.stats().modules.values()] == [1, 1]


def test_a_decoder_and_its_cache() -> None:
    model = llama()
    ids = torch.randint(0, VOCABULARY, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    with torch.no_grad(), Calibrator(model) as calibrator:
        cache = model(input_ids=ids, attention_mask=mask).past_key_values
    stats = calibrator.stats()

    assert list(stats.kv_cache) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for layer, record in zip(cache.layers, stats.kv_cache.values(), strict=True):
        for states, found in ((layer.keys, record.key_amax), (layer.values, record.value_amax)):
            real = states * mask[:, None, :, None]
            assert found == real.abs().amax(dim=(0, 2, 3)).tolist()
    assert len(kv_cache_scales(stats, per_head=True)["model.layers.0.self_attn"].key) == 2
    assert stats.modules["model.layers.1.mlp.down_proj"].in_features == 48
    assert stats.modules["lm_head"].values == (9 + 5) * HIDDEN
    with torch.no_grad(), Calibrator(model, kv_cache=False) as calibrator:
        model(input_ids=ids)
    assert calibrator.stats().kv_cache == {}


def test_pairs_of_keys_and_values_are_a_cache_too() -> None:
    class Output:
        past_key_values = ((torch.ones(1, 2, 3, 4) * 7, -torch.ones(1, 2, 3, 4) * 9),)

    class Old(Toy):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            super().forward(x)
            return Output()

    with Calibrator(model := Old()) as calibrator:
        model(torch.randn(1, 3, HIDDEN))
    (record,) = calibrator.stats().kv_cache.values()
    assert (record.key_amax, record.value_amax) == ([7.0, 7.0], [9.0, 9.0])


def test_the_scale_serves_the_layers_in_fp8() -> None:
    """End to end in memory: calibrate, make static layers, and stay close to the model."""
    model = Toy()
    x = torch.randn(4, 16, HIDDEN)
    with Calibrator(model) as calibrator:
        expected = model(x)
    scales = activation_scales(calibrator.stats())
    quantized = copy.deepcopy(model)
    report = fp8dispatch.convert_model(quantized, "row", activation_scales=scales)

    assert set(report.converted) == set(LINEARS)
    assert [
        name
        for name, module in quantized.named_modules()
        if hasattr(module, "recipe") and module.activation_scale is None
    ] == ["unused"], "no call reached it: dynamic"
    static = quantized.attention.o_proj.activation_scale
    assert static.tolist() == [scales["attention.o_proj"]]
    with pytest.raises(InvalidInputError, match="found 'q_proj', which is none"):
        fp8dispatch.convert_model(model, activation_scales={"q_proj": 1.0})
    got = quantized(x)

    error = (got - expected).norm() / expected.norm()
    assert 0.001 < error < 0.08


def test_experts_that_are_stacked_are_watched_one_by_one() -> None:
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    ids = torch.randint(0, VOCABULARY, (1, 3))
    seen: dict[int, int] = {}

    def routed(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for expert in arguments[1].flatten().tolist():
            seen[expert] = seen.get(expert, 0) + 1

    with torch.no_grad(), Calibrator(model) as calibrator:
        handle = experts.register_forward_pre_hook(routed)
        output = model(input_ids=ids).logits
        handle.remove()
        assert torch.equal(output, model(input_ids=ids).logits)
    stats = calibrator.stats()

    prefix = "model.layers.0.mlp.experts"
    found = {
        expert: stats.modules[f"{prefix}.{expert}.{part}"].values // size
        for expert in range(8)
        for part, size in (("gate_proj", HIDDEN), ("up_proj", HIDDEN), ("down_proj", 48))
    }
    assert found == {expert: 2 * seen.get(expert, 0) for expert in range(8)}
    idle = {expert for expert in range(8) if expert not in seen}
    assert 0 < len(idle) < 8
    assert {int(name.split(".")[5]) for name in unobserved(stats).experts} == idle
    scales = activation_scales(stats)
    for part in ("gate_proj", "up_proj", "down_proj"):
        largest = max(scales[f"{prefix}.{expert}.{part}"] for expert in seen)
        assert {scales[f"{prefix}.{expert}.{part}"] for expert in idle} == {largest}


@pytest.mark.parametrize("how", ["matmul", "bmm"])
def test_stacked_weights_of_the_other_orientation(how: str) -> None:
    """[E, K, N] as gpt-oss multiplies one, and Llama 4 all of them with zeros for idle ones."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 4, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if how == "matmul":
                return x[0] @ self.gate_up_proj[1]
            return torch.bmm(x, self.gate_up_proj)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.experts(x)
            return out

    x = torch.zeros(3, 5, 4)
    rows = x[0] if how == "matmul" else x[1]
    rows[:2] = 3.0
    with Calibrator(model := Layer()) as calibrator:
        model(x)
    records = calibrator.stats().modules

    counted = {name: record.values for name, record in records.items() if record.calls}
    expected = 5 * 4 if how == "matmul" else 2 * 4
    assert counted == {"experts.1.gate_proj": expected, "experts.1.up_proj": expected}
    assert records["experts.1.up_proj"].in_features == 4
    assert records["experts.1.up_proj"].amax == 3.0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CalibrationError, match="found none in ReLU"):
        Calibrator(nn.ReLU())
    with pytest.raises(DTypeError, match="found str"):
        Calibrator("model")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="found 'kl'"):
        Calibrator(Toy(), method="kl")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="0 or more"):
        Calibrator(Toy(), exclude_first_tokens=-1)
    calibrator = Calibrator(Toy())
    with pytest.raises(ShapeError, match=r"\[B, T\]"), calibrator.masked(torch.ones(3)):
        pass
    with calibrator, pytest.raises(CalibrationError, match="entered once"):
        calibrator.__enter__()


def test_an_error_in_the_model_leaves_it_usable() -> None:
    model = Toy()
    with pytest.raises(RuntimeError), Calibrator(model) as calibrator:
        model(torch.randn(1, 2, HIDDEN + 1))
    assert not model.attention.q_proj._forward_pre_hooks
    with calibrator:
        model(torch.randn(1, 2, HIDDEN))
    assert calibrator.stats().modules["attention.q_proj"].calls == 1
