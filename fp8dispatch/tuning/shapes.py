"""What to measure: sizes as they are written, and those of the linear layers of a model.

A model is its `config.json`, as Transformers reads it; nothing else of it is opened. The table
`FAMILIES` says, by model type, which layers a decoder has, from the code of the models in
Transformers. Embeddings, routers and `lm_head` stay unquantised and are left out, and so are vision
and audio towers. The experts of a mixture stand here as one linear layer for each expert; stacked
experts (`FP8Experts`) have routes of their own, which are not tuned.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fp8dispatch.errors import CheckpointError, DTypeError, ShapeError
from fp8dispatch.pack.jsonfiles import check_model, read_object

CONFIG = "config.json"
_MAX_CONFIG_BYTES = 8 << 20
_MAX_LAYERS = 4096  # more are no model, and a loop over them no answer
LARGEST = 1 << 24
"""Of M, N and K: a weight of two such sides would have 256 TB."""

_Size = Annotated[int, Field(ge=1, le=LARGEST)]
_Count = Annotated[int, Field(ge=0, le=LARGEST)]

ShapeLike = str | os.PathLike[str] | Sequence[int]
"""``(M, N, K)`` or ``(N, K)``, also as a text such as ``"16,4096,7168"``; or a config's path."""


@dataclass(frozen=True, order=True)
class Size:
    """A multiplication to measure: ``[M, K] x [N, K] -> [M, N]``."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class LayerShape:
    """The weight [N, K] of linear layers.

    Attributes:
        layers: their names in a block of the decoder.
        n, k: rows and columns of the weight.
    """

    layers: tuple[str, ...]
    n: int
    k: int


class ModelConfig(BaseModel):
    """What the sizes of a decoder's linear layers follow from; names as in `config.json`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model_type: str
    hidden_size: _Size
    num_attention_heads: _Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=_MAX_LAYERS)]
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    intermediate_size: _Size | None = None
    # Multi-head latent attention.
    q_lora_rank: _Size | None = None
    kv_lora_rank: _Size | None = None
    qk_nope_head_dim: _Size | None = None
    qk_rope_head_dim: _Size | None = None
    v_head_dim: _Size | None = None
    # Mixtures of experts.
    moe_intermediate_size: _Size | None = None
    shared_expert_intermediate_size: _Count | None = None
    n_shared_experts: _Count | None = None
    first_k_dense_replace: _Count = 0
    moe_layer_freq: _Size = 1
    decoder_sparse_step: _Size = 1
    mlp_only_layers: list[_Count] | None = None


@dataclass(frozen=True)
class Family:
    """How the decoders of a model type are built.

    Attributes:
        latent: attention goes through low ranks (MLA), as in DeepSeek.
        fused_qkv, fused_gate_up: one layer in place of three, and of two.
        experts: which layers are mixtures: none, those after the first dense ones ("first"), or
            every so many ("step"); "all" where `intermediate_size` is that of an expert.
    """

    latent: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    experts: str = ""


_PLAIN, _LATENT = Family(), Family(latent=True, experts="first")
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
            *("granite", "olmo", "olmo2", "olmo3", "smollm3", "cohere", "cohere2", "seed_oss"),
            *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
        ),
        _PLAIN,
    ),
    **dict.fromkeys(("glm", "glm4"), Family(fused_gate_up=True)),
    "phi3": Family(fused_qkv=True, fused_gate_up=True),
    **dict.fromkeys(("mixtral", "olmoe"), Family(experts="all")),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text"), Family(experts="step")),
    "glm4_moe": Family(experts="first"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), _LATENT),
}
"""Model type -> how its decoder is built."""


def parse_shapes(shapes: ShapeLike | Sequence[ShapeLike], tokens: Sequence[int]) -> list[Size]:
    """The sizes to measure, each once, in the order given.

    Args:
        shapes: one or several of ``(M, N, K)``, ``(N, K)`` and paths of a config or its folder.
        tokens: M of those that do not say it.

    Raises:
        InvalidInputError: nothing to measure, or what cannot be read; a CheckpointError for a
            config.
    """
    for count in tokens:
        _check(count, "each of tokens")
    several: Sequence[Any]
    if isinstance(shapes, (str, os.PathLike)) or any(isinstance(one, int) for one in shapes):
        several = [shapes]
    else:
        several = list(shapes)
    sizes: dict[Size, None] = {}
    for shape in several:
        sizes |= dict.fromkeys(_sizes(shape, tokens))
    if not sizes:
        raise ShapeError(
            "shapes must name at least one M,N,K or a model's config.json, and N,K and a model "
            "need tokens, found none"
        )
    return list(sizes)


def model_shapes(path: str | os.PathLike[str]) -> tuple[LayerShape, ...]:
    """The weights of a model's linear layers, those of one shape together.

    Args:
        path: a `config.json`, or its folder.

    Raises:
        CheckpointError: a file that is no such config, or of a model type that is not known.
    """
    file = Path(path)
    file = file / CONFIG if file.is_dir() else file
    content = read_object(file, _MAX_CONFIG_BYTES)
    inner = content.get("text_config")
    if "hidden_size" not in content and isinstance(inner, dict):
        content = inner  # the language model of one that also sees or hears
    kind = content.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise CheckpointError(
            f"{file}: the linear layers must follow from a model_type that is known here "
            f"({', '.join(sorted(FAMILIES))}), found {str(kind)[:100]!r}; give its weights as N,K "
            f"instead"
        )
    config = check_model(content, ModelConfig, str(file))
    found: dict[tuple[int, int], list[str]] = {}
    for name, n, k in _layers(config, family, str(file)):
        if max(n, k) > LARGEST:
            raise CheckpointError(
                f"{file}: {name} must have at most {LARGEST} rows and columns, found {n} x {k}; "
                f"correct the file"
            )
        found.setdefault((n, k), []).append(name)
    return tuple(LayerShape(tuple(names), n, k) for (n, k), names in found.items())


def _sizes(shape: Any, tokens: Sequence[int]) -> Iterator[Size]:
    if isinstance(shape, str) and re.fullmatch(r"[\s\d,]+", shape):
        shape = [int(part) for part in shape.split(",") if part.strip()]
    if isinstance(shape, (str, os.PathLike)):
        for layer in model_shapes(shape):
            yield from (Size(m, layer.n, layer.k) for m in tokens)
        return
    if not isinstance(shape, Sequence) or len(shape) not in (2, 3):
        raise ShapeError(
            f"a shape must be M,N,K or N,K or the path of a model's config.json, found {shape!r}"
        )
    for value in shape:
        _check(value, "M, N and K of a shape")
    *given, n, k = (int(value) for value in shape)
    yield from (Size(m, n, k) for m in given or tokens)


def _check(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DTypeError(f"{what} must be an integer, found {value!r}")
    if not 1 <= int(value) <= LARGEST:
        raise ShapeError(f"{what} must lie between 1 and {LARGEST}, found {value}")


def _layers(config: ModelConfig, family: Family, where: str) -> Iterator[tuple[str, int, int]]:
    yield from (
        _latent_attention(config, where) if family.latent else _attention(config, family, where)
    )
    hidden = config.hidden_size
    sparse = _sparse_layers(config, family)
    if not all(sparse):
        yield from _mlp("", _need(config, "intermediate_size", where), hidden, family)
    if not any(sparse):
        return
    expert = "intermediate_size" if family.experts == "all" else "moe_intermediate_size"
    width = _need(config, expert, where)
    yield from _mlp("expert ", width, hidden, Family())
    # One layer as wide as all shared experts together.
    shared = config.shared_expert_intermediate_size or (config.n_shared_experts or 0) * width
    if shared:
        yield from _mlp("shared ", shared, hidden, Family())


def _attention(config: ModelConfig, family: Family, where: str) -> Iterator[tuple[str, int, int]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    groups = config.num_key_value_heads or heads
    if config.head_dim is None and hidden % heads:
        raise CheckpointError(
            f"{where}: hidden_size must be a multiple of num_attention_heads where there is no "
            f"head_dim, found {hidden} and {heads}; correct the file"
        )
    width = config.head_dim or hidden // heads
    if family.fused_qkv:
        yield "qkv_proj", (heads + 2 * groups) * width, hidden
    else:
        yield "q_proj", heads * width, hidden
        yield "k_proj", groups * width, hidden
        yield "v_proj", groups * width, hidden
    yield "o_proj", hidden, heads * width


def _latent_attention(config: ModelConfig, where: str) -> Iterator[tuple[str, int, int]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    rank = _need(config, "kv_lora_rank", where)
    plain, rotated, value = (
        _need(config, name, where)
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    if config.q_lora_rank is None:
        yield "q_proj", heads * (plain + rotated), hidden
    else:
        yield "q_a_proj", config.q_lora_rank, hidden
        yield "q_b_proj", heads * (plain + rotated), config.q_lora_rank
    yield "kv_a_proj_with_mqa", rank + rotated, hidden
    yield "kv_b_proj", heads * (plain + value), rank
    yield "o_proj", hidden, heads * value


def _mlp(prefix: str, width: int, hidden: int, family: Family) -> Iterator[tuple[str, int, int]]:
    if family.fused_gate_up:
        yield f"{prefix}gate_up_proj", 2 * width, hidden
    else:
        yield f"{prefix}gate_proj", width, hidden
        yield f"{prefix}up_proj", width, hidden
    yield f"{prefix}down_proj", hidden, width


def _sparse_layers(config: ModelConfig, family: Family) -> list[bool]:
    """Whether each layer is a mixture."""
    layers = range(config.num_hidden_layers)
    if family.experts == "step":
        dense = set(config.mlp_only_layers or ())
        return [i not in dense and (i + 1) % config.decoder_sparse_step == 0 for i in layers]
    if family.experts == "first":
        first, step = config.first_k_dense_replace, config.moe_layer_freq
        return [i >= first and i % step == 0 for i in layers]
    return [family.experts == "all" for _ in layers]


def _need(config: ModelConfig, name: str, where: str) -> int:
    value: Any = getattr(config, name)
    if value is None:
        raise CheckpointError(
            f"{where}: a {config.model_type} model needs {name}, found none; correct the file"
        )
    return int(value)
