"""Patterns over the names of modules: one meaning for every ``skip`` and ``only``."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a module: whole parts of its name, or a wildcard over all of it.

    ``"lm_head"`` means ``lm_head`` and ``model.lm_head``, ``"mlp.gate"`` means
    ``layers.0.mlp.gate`` and not ``layers.0.mlp.gate_proj``; ``"*.experts.*"`` is a wildcard.
    """
    return f".{pattern}." in f".{name}." or fnmatchcase(name, pattern)
