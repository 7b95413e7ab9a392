"""How readers split and fuse linear layers: by the layers' names, as vLLM's models do it.

A layer's weight [N, K] is split along N ("column" parallel), along K ("row" parallel), or kept
whole on every rank. Some layers are stored apart and multiplied as one: q/k/v, gate/up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["column", "row", "whole"]

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Layers beside each other that one matrix multiplication serves, in the order they are joined."""

_WHOLE = ("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj")
_COLUMN = (
    *(name for family in FAMILIES for name in family if name not in _WHOLE),
    "qkv_proj",
    "gate_up_proj",
    "q_b_proj",
    "kv_b_proj",
    "fc1",
    "intermediate.dense",
)
_ROW = ("o_proj", "out_proj", "down_proj", "w2", "fc2", "output.dense")


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model, from its ``config.json``.

    Attributes:
        kv: key-value heads in all.
        dim: features of one head.
    """

    kv: int
    dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Heads | None:
        """From a configuration, or None where it does not say."""
        if config is None:
            return None
        text = config.get("text_config")
        source = text if isinstance(text, dict) else config
        query = source.get("num_attention_heads")
        kv = source.get("num_key_value_heads") or query
        hidden, dim = source.get("hidden_size"), source.get("head_dim")
        if (
            not isinstance(dim, int)
            and isinstance(hidden, int)
            and isinstance(query, int)
            and query
        ):
            dim = hidden // query
        if isinstance(kv, int) and isinstance(dim, int) and kv > 0 and dim > 0:
            return cls(kv, dim)
        return None


def split_of(name: str) -> Split:
    """How a module is split over the ranks of tensor parallelism."""
    for split, leaves in (("column", _COLUMN), ("row", _ROW)):
        if any(name == leaf or name.endswith(f".{leaf}") for leaf in leaves):
            return "column" if split == "column" else "row"
    return "whole"


def fused_siblings(name: str) -> tuple[str, ...]:
    """Full names of the layers that are multiplied as one with this one, itself included and in
    order; empty for a layer that stands alone. Whether they all exist is for the caller to see."""
    parent, dot, leaf = name.rpartition(".")
    family = next((family for family in FAMILIES if leaf in family), ())
    return tuple(f"{parent}{dot}{member}" for member in family)


def per_rank(
    name: str, shape: tuple[int, int], tp: int, heads: Heads | None
) -> tuple[int, int] | None:
    """The part (N, K) of a weight that one of `tp` ranks holds; None when it cannot be split.

    Where there are fewer KV heads than ranks, each rank holds one whole head.
    """
    n, k = shape
    split = split_of(name)
    if tp == 1 or split == "whole":
        return n, k
    if split == "row":
        return None if k % tp else (n, k // tp)
    leaf = name.rpartition(".")[2]
    if (
        heads is not None
        and leaf in ("k_proj", "v_proj", "key", "value")
        and heads.kv < tp
        and n == heads.kv * heads.dim
    ):
        return None if tp % heads.kv else (heads.dim, k)
    return None if n % tp else (n // tp, k)
