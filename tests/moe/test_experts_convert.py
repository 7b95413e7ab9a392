"""Fused experts of Transformers' models become `FP8Experts` that compute the same, or stay."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp8dispatch import (
    ExpertActivation,
    FP8Experts,
    InvalidInputError,
    NumericalOverflowError,
    convert_model,
)
from fp8dispatch.moe.convert import is_experts, why_left_alone
from tests import oracle

E, INNER, H = 4, 48, 64

CONFIG = SimpleNamespace(
    hidden_size=H,
    hidden_dim=H,
    moe_hidden_size=H,
    moe_latent_size=None,
    intermediate_size=INNER,
    moe_intermediate_size=INNER,
    num_local_experts=E,
    num_experts=E,
    n_routed_experts=E,
    moe_num_experts=E,
    num_experts_per_tok=2,
    hidden_act="silu",
    hidden_activation="gelu_pytorch_tanh",
    mlp_hidden_act="relu2",
    swiglu_alpha=1.702,
    swiglu_limit=1.5,
    mlp_gate_softcap=2.0,
    mlp_up_softcap=2.0,
    post_norm_eps=1e-6,
    _experts_implementation="eager",
)


def theirs(model: str, name: str) -> Any:
    """Experts of a model of Transformers, random."""
    pytest.importorskip("transformers", minversion="5.14")
    try:
        module = import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        pytest.skip(f"this Transformers has no {model}")
    if not hasattr(module, name):
        pytest.skip(f"this Transformers has no {name}")
    experts = getattr(module, name)(CONFIG)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def compare(original: nn.Module, converted: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """Relative error over tokens that use every expert."""
    x = torch.randn(16, H, dtype=dtype)
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(16)])
    weights = torch.rand(16, 2)
    with torch.no_grad():
        expected, got = original(x, ids, weights.to(dtype)), converted(x, ids, weights)
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(
    ("model", "name", "activation"),
    [
        ("mixtral", "MixtralExperts", ExpertActivation()),
        ("aria", "AriaExperts", ExpertActivation()),
        ("gemma4", "Gemma4TextExperts", ExpertActivation("gelu_pytorch_tanh")),
        ("deepseek_v4", "DeepseekV4Experts", ExpertActivation(limit=1.5)),
        ("minimax_m3_vl", "MiniMaxM3VLExperts", ExpertActivation(limit=1.5, alpha=1.702)),
        ("gpt_oss", "GptOssExperts", ExpertActivation(limit=1.5, alpha=1.702)),
        ("nemotron_h", "NemotronHExperts", ExpertActivation("relu2", gated=False)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_of_transformers(
    model: str, name: str, activation: ExpertActivation, dtype: torch.dtype
) -> None:
    """Stored as [E, N, K] or transposed, gate and up in two halves or taking turns, with a bias."""
    holder = nn.ModuleDict({"experts": theirs(model, name).to(dtype)})
    original = holder["experts"]

    report = convert_model(holder, "row")

    experts = holder["experts"]
    assert isinstance(experts, FP8Experts)
    assert (report.converted, report.skipped) == (("experts",), ())
    assert experts.activation == activation
    assert experts.top_k == 2
    biases = {name for name, p in experts.named_parameters() if p.requires_grad}
    assert biases == ({"gate_up_proj_bias", "down_proj_bias"} if original.has_bias else set())
    assert compare(original, experts, dtype) < 0.09


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        ("muse_spark", "MuseSparkExperts", "norm behind each expert"),
        ("inkling2", "Inkling2Experts", "between its two matmuls"),
    ],
)
def test_experts_that_compute_something_else_stay(model: str, name: str, reason: str) -> None:
    holder = nn.ModuleDict({"experts": theirs(model, name)})
    before = holder["experts"]

    report = convert_model(holder)

    assert holder["experts"] is before
    assert report.converted == ()
    assert [entry for entry, _ in report.skipped] == ["experts"]
    assert reason in report.skipped[0][1]


class Experts(nn.Module):
    """Experts as Transformers declares them, without Transformers."""

    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * INNER, H) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(E, H, INNER) * 0.1)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for slot in range(ids.shape[1]):
            up, down = self.gate_up_proj[ids[:, slot]], self.down_proj[ids[:, slot]]
            inner = self._apply_gate(torch.einsum("tnk,tk->tn", up, x))
            total += weights[:, slot, None] * torch.einsum("tnk,tk->tn", down, inner)
        return total


def reason_for(change: Any) -> str | None:
    experts = Experts()
    change(experts)
    return why_left_alone(experts)


def test_reasons_to_leave_experts_alone() -> None:
    def undeclared(experts: Any) -> None:
        experts.__class__ = type("Old", (nn.Module,), {})

    def scaled(experts: Any) -> None:
        experts.per_expert = nn.Parameter(torch.ones(E))

    def without(experts: Any) -> None:
        experts.has_bias = True

    def empty(experts: Any) -> None:
        experts.down_proj = nn.Parameter(torch.empty(0, H, INNER))

    assert why_left_alone(Experts()) is None
    assert "does not declare has_gate" in str(reason_for(undeclared))
    assert "it holds per_expert" in str(reason_for(scaled))
    assert "it has no down_proj_bias, gate_up_proj_bias" in str(reason_for(without))
    assert reason_for(empty) == "an empty weight"
    assert "hooks" in str(reason_for(lambda e: e.register_forward_hook(lambda *_: None)))
    assert "torch.float64, not unquantised" in str(reason_for(lambda e: e.double()))
    assert "between its two matmuls" in str(
        reason_for(lambda e: setattr(e, "_apply_gate", lambda both: both.chunk(2, -1)[0].sin()))
    )


def test_an_almost_equal_gate_is_told_apart() -> None:
    """GELU and its tanh form differ by less than 1e-3, clamping shows only beyond the limit."""

    def activation_of(gate: Any, **attributes: Any) -> ExpertActivation:
        experts: Any = Experts()
        experts._apply_gate = gate
        for name, value in attributes.items():
            setattr(experts, name, value)
        holder = nn.ModuleDict({"experts": experts})
        convert_model(holder)
        found: ExpertActivation = holder["experts"].activation
        return found

    def gelu(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return F.gelu(gate) * up

    def silu(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    def clamped(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate.clamp(max=40)) * up.clamp(-40, 40)

    assert activation_of(gelu) == ExpertActivation("gelu")
    assert activation_of(silu, limit=40.0) == ExpertActivation("silu")
    assert activation_of(clamped, limit=40.0) == ExpertActivation("silu", limit=40.0)


def test_conversion_of_a_model_around_experts() -> None:
    model = nn.ModuleDict({"up": nn.Linear(H, H), "experts": Experts(), "other": Experts()})
    model["twin"] = model["experts"]
    model["experts"].eval()
    original = model["experts"]
    fp32 = {name: p.nbytes for name, p in model.named_parameters()}

    report = convert_model(model, skip=["other"])

    assert report.converted == ("up", "experts", "twin")
    assert report.skipped == (("other", "skip='other'"),)
    assert model["twin"] is model["experts"]
    assert not model["experts"].training
    held = fp32["up.weight"] + fp32["experts.gate_up_proj"] + fp32["experts.down_proj"]
    assert report.bytes_before == held
    kept = [model["up"].weight, model["up"].weight_scale, *model["experts"].parameters()]
    assert report.bytes_after == sum(tensor.nbytes for tensor in kept)
    assert compare(original, model["experts"]) < 0.09
    again = convert_model(model, skip=["up", "other"])
    assert again.converted == ()
    assert not is_experts(model["experts"])


def test_a_model_with_broken_experts_is_not_half_converted() -> None:
    model = nn.ModuleDict({"up": nn.Linear(H, H), "experts": Experts()})
    with torch.no_grad():
        model["experts"].down_proj[2, 1, 1] = torch.nan

    with pytest.raises(NumericalOverflowError, match=r"layer 'experts': expert 2: .*finite"):
        convert_model(model)

    assert type(model["up"]) is nn.Linear
    with pytest.raises(InvalidInputError, match=r"FP8Experts\.from_weights"):
        convert_model(Experts())


def test_activations() -> None:
    gate, up = torch.randn(2, 5, 8, dtype=torch.float64) * 4
    both = torch.cat([gate, up], -1)
    low, clamped = gate.clamp(max=2), up.clamp(-2, 2)

    for function, expected in {
        "swish": gate / (1 + torch.exp(-gate)),
        "gelu": gate * 0.5 * (1 + torch.erf(gate / 2**0.5)),
        "gelu_new": gate
        * 0.5
        * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))),
        "relu2": gate.clamp(min=0) ** 2,
        "identity": gate,
    }.items():
        activation = ExpertActivation(function)
        torch.testing.assert_close(activation(both), expected * up)
        torch.testing.assert_close(activation(gate, up), expected * up)
        torch.testing.assert_close(ExpertActivation(function, gated=False)(gate), expected)
    limited = ExpertActivation(limit=2)
    torch.testing.assert_close(limited(both), low * torch.sigmoid(low) * clamped)
    oss = ExpertActivation(limit=2, alpha=1.7)
    torch.testing.assert_close(oss(both), low * torch.sigmoid(1.7 * low) * (clamped + 1))
    assert oracle.sqnr(limited(both), ExpertActivation()(both)).min() < 60


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"function": "selu"}, "must be one of silu, gelu"),
        ({"limit": 0.0}, "limit of an expert activation must be positive, found 0.0"),
        ({"limit": float("nan")}, "must be positive, found nan"),
        ({"alpha": 1.7, "function": "gelu"}, "found the function 'gelu' beside it"),
        ({"limit": 7.0, "gated": False}, "limit and alpha belong to gated experts"),
    ],
)
def test_activations_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        ExpertActivation(**options)


def test_an_activation_that_does_not_fit_the_experts() -> None:
    weights = {"up_proj": torch.randn(2, 8, 8), "down_proj": torch.randn(2, 8, 8)}

    with pytest.raises(InvalidInputError, match=r"activation\.gated must be False"):
        FP8Experts.from_weights(weights, activation=ExpertActivation())
    with pytest.raises(InvalidInputError, match="must be a name such as 'silu'"):
        FP8Experts.from_weights(weights, activation=torch.relu)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="odd number"):
        ExpertActivation()(torch.randn(2, 5))
