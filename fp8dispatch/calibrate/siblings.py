"""Which layers belong together, by their names: fused ones, and the experts of one layer.

Serving engines run the projections of a group as one matmul over one quantised input, so they must
have one activation scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Last parts of names that engines fuse when they stand in the same module."""

_GROUP_OF = {part: index for index, parts in enumerate(FUSED) for part in parts}
_EXPERT = re.compile(r"(?P<layer>.*\bexperts)\.(?P<index>\d+)\.(?P<part>.+)")


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups of two and more names that are fused, in the order of their first members."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, part = name.rpartition(".")
        if part in _GROUP_OF:
            groups.setdefault((parent, _GROUP_OF[part]), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def expert_peers(name: str) -> str | None:
    """What the same projection of every expert of a layer has in common; None for no expert.

    ``"mlp.experts.3.up_proj"`` and ``"mlp.experts.7.up_proj"`` share ``"mlp.experts.*.up_proj"``.
    """
    found = _EXPERT.fullmatch(name)
    return f"{found['layer']}.*.{found['part']}" if found else None
