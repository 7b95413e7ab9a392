"""Weights whose sides are no multiples of the blocks: where that matters, and what is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

from fp8dispatch.pack.layouts.contract import PackedModule
from fp8dispatch.pack.layouts.loadability import verdicts
from fp8dispatch.pack.layouts.sharding import fused_siblings
from fp8dispatch.pack.options import OnRagged, Resolved
from fp8dispatch.pack.scheme import SCHEMES, Scheme

_HEADS = 1 << 10  # a twin is as large as this many whole heads, experts or ranks may ask for


@dataclass
class Ragged:
    """What is done about ragged weights.

    Attributes:
        skipped: module -> why it stays in high precision.
        schemes: module -> the scheme that it takes instead.
        problems: sentences, where `OnRagged.ERROR` holds.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def apply_ragged(
    modules: Mapping[str, PackedModule],
    resolved: Resolved,
    skipped: Collection[str],
    config: Mapping[str, Any] | None,
) -> Ragged:
    """Find the weights whose shape keeps them out of the format or its loaders, and act.

    Layers that are fused when served follow the one of them that is ragged, since loaders want
    them alike.

    Args:
        modules: what is to be quantised.
        resolved: format, targets and `OnRagged`.
        skipped: linear modules that are not quantised.
        config: the model's configuration.
    """
    result = Ragged()
    if resolved.scheme.recipe.block_size is None or resolved.on_ragged is OnRagged.PAD:
        return result
    for name, reason in _reasons(modules, resolved, skipped, config).items():
        n, k = modules[name].shape
        if resolved.on_ragged is OnRagged.ERROR:
            result.problems.append(
                f"{name}.weight [{n}, {k}]: whole blocks are needed ({resolved.scheme.recipe}), "
                f"found that {reason}; use --on-ragged skip, channel or pad, or --recipe channel"
            )
            continue
        alike = [one for one in (name, *fused_siblings(name)) if one in modules]
        for one in alike:
            if resolved.on_ragged is OnRagged.CHANNEL:
                result.schemes[one] = replace(SCHEMES["channel"], dtype=resolved.scheme.dtype)
            else:
                why = f"ragged: {reason}" if one == name else f"fused with {name}, which is ragged"
                result.skipped.setdefault(one, why)
    return result


def _reasons(
    modules: Mapping[str, PackedModule],
    resolved: Resolved,
    skipped: Collection[str],
    config: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Modules that their shape alone keeps out: a larger one of whole blocks would get in."""
    block = resolved.scheme.recipe.block_size or (1, 1)
    layout, tp = resolved.layout, resolved.asked.tp
    unit = lcm(block[0], block[1]) * tp * _HEADS
    twins = {name: replace(module, shape=(unit, unit)) for name, module in modules.items()}
    reasons = {}
    for name, module in modules.items():
        refusals = layout.refuse(module.scheme, module.shape)
        if refusals and not layout.refuse(module.scheme, twins[name].shape):
            reasons[name] = refusals[0].partition(";")[0]
    asked = (layout.name, modules, skipped, resolved.targets, tp, config)
    whole = {
        (verdict.target, verdict.module): verdict.loads
        for verdict in verdicts(layout.name, twins, skipped, resolved.targets, tp, config)
    }
    for verdict in verdicts(*asked):
        if not verdict.loads and whole[verdict.target, verdict.module]:
            reasons.setdefault(verdict.module, f"in {verdict.target} {verdict.reason}")
    return reasons
