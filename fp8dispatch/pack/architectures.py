"""Which layers of a model stay in high precision: a table over names, by architecture.

Sources: the skip lists of vLLM, llm-compressor and ModelOpt for the general rules; the files that
the makers of the models published for the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Rule = tuple[re.Pattern[str], str]

SMALLEST_SIDE = 64
"""Weights with a shorter side stay as they are: they cost nothing and quantise badly."""


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), reason) for pattern, reason in pairs)


# Patterns are searched in module names, without ``.weight``.
EVERYWHERE = _rules(
    (
        r"(^|\.)(lm_head|embed_out|proj_out|output_layer|score|classifier|qa_outputs|output"
        r"|shared_head(\.head)?|predictions(\..*)?|pre_classifier|classification_head"
        r"|.*_head|heads?)$",
        "output head",
    ),
    (r"(^|\.)(wte|wpe|shared|\w*embed\w*|\w*embs?|codebook\w*)(\.|$)", "embedding"),
    (r"(^|[._])(layer|rms|group|batch|\w*)norm\w*$|(^|\.)ln_\w+$", "norm"),
    (r"rotary|rope|inv_freq", "rotary embedding"),
    (
        r"(^|\.)(router(\.\w+)?|gate|gate\.wg|shared_expert_gate|switch|\w*_router)$",
        "router: a wrong choice of expert costs more than its weights",
    ),
    (r"(^|\.)(conv\w*|\w*_conv\w*|dwconv|patch_embed\w*)(\.|$)", "convolution"),
    (r"(^|\.)mtp(\.|$)|(^|\.)eh_proj$", "multi-token prediction, kept as it is"),
    (
        r"(^|\.)(visual|vision\w*|image_\w+|multi_modal_projector|mm_projector|connector)(\.|$)",
        "vision tower",
    ),
    (r"(^|\.)(audio\w*|speech\w*|feature_extractor|feature_projection)(\.|$)", "audio tower"),
    (r"(^|\.)(lora_[AB]\w*|adapter\w*)(\.|$)", "adapter"),
)

BY_ARCHITECTURE: Mapping[str, tuple[Rule, ...]] = {
    "qwen3_next": _rules((r"\.linear_attn\.", "linear attention: sensitive, and small")),
    "qwen3_5": _rules((r"\.linear_attn\.", "linear attention: sensitive, and small")),
    "deepseek_v32": _rules((r"\.indexer(\.|$)", "sparse attention's indexer")),
    "deepseek_v4": _rules(
        (r"\.(indexer|compressor)(\.|$)", "sparse attention's indexer and compressor")
    ),
    "glm_moe_dsa": _rules((r"\.indexer(\.|$)", "sparse attention's indexer")),
    "nemotron_h": _rules((r"_latent_proj$", "latent projection of the mixture")),
    "mamba": _rules((r"\.(x_proj|dt_proj)$", "state-space parameters")),
    "jamba": _rules((r"\.(x_proj|dt_proj)$", "state-space parameters")),
    "t5": _rules((r"\.relative_attention_bias$", "position bias")),
    "whisper": _rules((r"(^|\.)embed_positions$", "embedding")),
}
"""Model type, or the beginning of one, -> rules beside `EVERYWHERE`."""

# In these the tower is the model itself.
_AUDIO_MODELS = ("whisper", "wav2vec2", "hubert", "speech_to_text", "audio", "moonshine")
_VISION_MODELS = ("vit", "clip", "siglip", "dinov2", "dinov3", "vision")


def model_types(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The model's type and those of its parts: ``("qwen3_vl_moe", "qwen3_vl_moe_text")`` say."""
    found = []
    parts = [config or {}]
    parts += [part for part in (config or {}).values() if isinstance(part, dict)]
    for part in parts:
        name = part.get("model_type")
        if isinstance(name, str) and name not in found:
            found.append(name)
    return tuple(found)


def rules_for(types: tuple[str, ...]) -> Iterator[Rule]:
    """Every rule that holds for a model of these types."""
    main = types[0] if types else ""
    for pattern, reason in EVERYWHERE:
        if reason == "audio tower" and main.startswith(_AUDIO_MODELS):
            continue
        if reason == "vision tower" and main.startswith(_VISION_MODELS):
            continue
        yield pattern, reason
    for name, rules in BY_ARCHITECTURE.items():
        if any(kind.startswith(name) for kind in types):
            yield from rules


def vocabulary_size(config: Mapping[str, Any] | None) -> int | None:
    """Rows of the embedding, by the configuration."""
    for part in (config or {}, (config or {}).get("text_config")):
        size = part.get("vocab_size") if isinstance(part, Mapping) else None
        if isinstance(size, int):
            return size
    return None
