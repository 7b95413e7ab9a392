"""Tiny models: one of plain torch, and the checkpoints that Transformers reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, VOCABULARY = 32, 128
CHARACTERS = {chr(code): code for code in range(32, 127)}


class Attention(nn.Module):
    """q, k and v over one input, and a projection of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.k_proj = nn.Linear(HIDDEN, 8)
        self.v_proj = nn.Linear(HIDDEN, 8)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.q_proj(x) + self.k_proj(x).repeat(1, 1, 4) + self.v_proj(x).repeat(1, 1, 4)
        out: torch.Tensor = self.o_proj(mixed)
        return out


class Toy(nn.Module):
    """[B, T, K] through a norm and an attention; `unused` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attention = Attention()
        self.unused = nn.Linear(HIDDEN, 4)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.attention(self.norm(x))
        return out


def llama(**changes: Any) -> Any:
    """A Llama of two layers, ragged in every dimension."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**settings, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def mixtral() -> Any:
    """A mixture of eight experts in one layer, their weights stacked."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        experts_implementation="eager",
    )
    return transformers.MixtralForCausalLM(config).eval()


def t5() -> Any:
    """An encoder with a decoder; padding and the decoder's first token have the id 0."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.T5Config(
        d_model=HIDDEN,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def whisper() -> Any:
    """An encoder with a decoder that reads sound."""
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=VOCABULARY,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def save_checkpoint(model: Any, directory: Path) -> Path:
    """A model and a tokenizer of single characters, as Transformers writes them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({**CHARACTERS, "<unk>": 0}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>"
    ).save_pretrained(directory)
    assert json.loads((directory / "config.json").read_text())["architectures"]
    return directory
