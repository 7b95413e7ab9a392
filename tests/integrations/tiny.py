"""Tiny random mixture-of-experts models of Transformers, and their FP8 forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fp8dispatch

transformers = pytest.importorskip("transformers", minversion="5.14")

from transformers.integrations import finegrained_fp8  # noqa: E402

BLOCK = (32, 32)
HIDDEN, INNER, EXPERTS, TOP_K = 64, 48, 8, 2
COMMON = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "moe_intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_experts_per_tok": TOP_K,
}


def deepseek_v3(layers: int = 2) -> Any:
    config = transformers.DeepseekV3Config(
        **COMMON,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=EXPERTS,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        qk_nope_head_dim=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=layers - 1,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def qwen3_moe(layers: int = 2) -> Any:
    config = transformers.Qwen3MoeConfig(
        **COMMON,
        num_hidden_layers=layers,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=EXPERTS,
        mlp_only_layers=list(range(layers - 1)),
    )
    return transformers.Qwen3MoeForCausalLM(config)


FAMILIES: dict[str, Callable[..., Any]] = {"deepseek-v3": deepseek_v3, "qwen3-moe": qwen3_moe}


def make(family: str, layers: int = 2) -> Any:
    """A model whose weights are large enough that the experts matter to the output."""
    model = FAMILIES[family](layers)
    for name, parameter in model.named_parameters():
        if "proj" in name or "gate" in name:
            nn.init.normal_(parameter, std=0.3 if "experts" in name else 0.15)
    return model.eval()


def linears(model: Any) -> list[str]:
    """The names of all linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def quantized(
    model: Any,
    block_size: tuple[int, int] | None = BLOCK,
    scale_fmt: str = "float",
    *,
    with_linears: bool = False,
) -> Any:
    """The model with Transformers' own FP8 experts (and linears), quantised by this library."""
    twin = copy.deepcopy(model)
    skip = ["lm_head"] if with_linears else linears(model)
    options = {} if scale_fmt == "float" else {"scale_fmt": scale_fmt}
    config = transformers.FineGrainedFP8Config(weight_block_size=block_size, **options)
    twin = finegrained_fp8.replace_with_fp8_linear(twin, skip, config)
    recipe = "tensor" if block_size is None else "block"
    scale_dtype = torch.float32 if scale_fmt == "float" else torch.float8_e8m0fnu
    source = dict(model.named_parameters())
    for name, module in twin.named_modules():
        stored = {"block_size": block_size, "scale_dtype": scale_dtype}
        if isinstance(module, finegrained_fp8.FP8Experts):
            for one in ("gate_up_proj", "down_proj"):
                weight = source[f"{name}.{one}"]
                if block_size is None and one == "gate_up_proj":  # a scale for each half
                    pairs = [fp8dispatch.quantize_experts(h, recipe) for h in weight.chunk(2, 1)]
                    data = torch.cat([data for data, _ in pairs], 1)
                    scale = torch.stack([scale for _, scale in pairs], 1)
                else:
                    data, scale = fp8dispatch.quantize_experts(weight, recipe, **stored)
                    scale = scale.unsqueeze(-1) if block_size is None else scale
                _replace(module, one, data)
                _replace(module, f"{one}_scale_inv", scale)
        elif isinstance(module, finegrained_fp8.FP8Linear):
            data, scale = fp8dispatch.quantize(source[f"{name}.weight"], recipe, **stored)
            _replace(module, "weight", data)
            _replace(module, "weight_scale_inv", scale.reshape(module.weight_scale_inv.shape))
    return twin.eval()


def _replace(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    declared = module.get_parameter(name)
    assert declared.shape == tensor.shape, name
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
