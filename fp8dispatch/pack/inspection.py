"""`inspect`: what a packed checkpoint is and what its scales and codes look like."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

from pydantic import BaseModel

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.examine import ModuleFacts, examine
from fp8dispatch.pack.layouts.contract import PackedModule
from fp8dispatch.pack.packed import PackedCheckpoint


class Inspection(BaseModel):
    """What `inspect` found.

    Attributes:
        layout: name of the format.
        schemes: scheme, in words -> how many modules have it.
        modules: each quantised module that was asked for.
        skipped: modules that the configuration leaves in high precision.
        kv_layers: how many attention layers have KV scales.
        kv_heads: KV heads with scales of their own; None when a layer has one.
        scale_bins: floor(log2(scale)) -> how many, over all modules asked for.
        notes: what else was noticed.
    """

    layout: str
    schemes: dict[str, int]
    modules: list[ModuleFacts]
    skipped: list[str]
    kv_layers: int
    kv_heads: int | None
    scale_bins: dict[int, int]
    notes: list[str]


def inspect(
    path: str | os.PathLike[str],
    tensor: str | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Inspection:
    """Look into a packed checkpoint: its format, its scales, NaN and zero codes.

    Args:
        path: a packed folder, in any format that `read_contents` knows.
        tensor: only this module, or the one that this tensor belongs to.
        progress: called with (done, of, module name) before each module.

    Raises:
        CheckpointError: a checkpoint that is damaged or not packed, or that has no such tensor.
    """
    packed = PackedCheckpoint.open(path)
    contents = packed.contents
    chosen = list(contents.modules.values()) if tensor is None else [_find(packed, tensor)]
    facts = []
    for number, module in enumerate(chosen):
        if progress is not None:
            progress(number, len(chosen), module.name)
        facts.append(examine(packed, module))
    bins: Counter[int] = Counter()
    for fact in facts:
        bins.update(fact.scale_bins)
    schemes = Counter(str(module.scheme) for module in contents.modules.values())
    return Inspection(
        layout=contents.layout,
        schemes=dict(schemes.most_common()),
        modules=facts,
        skipped=list(contents.skipped),
        kv_layers=0 if contents.kv is None else len(contents.kv.layers),
        kv_heads=None if contents.kv is None else contents.kv.heads,
        scale_bins=dict(sorted(bins.items())),
        notes=[*contents.notes, *_notes(packed, facts)],
    )


def _find(packed: PackedCheckpoint, tensor: str) -> PackedModule:
    for module in packed.contents.modules.values():
        if tensor == module.name or any(tensor == stored.name for stored in module.tensors):
            return module
    raise CheckpointError(
        f"{packed.checkpoint.folder}: {tensor!r} must be a quantised module or one of its tensors, "
        f"found none of that name; see the names with fp8dispatch inspect"
    )


def _notes(packed: PackedCheckpoint, facts: list[ModuleFacts]) -> list[str]:
    notes = []
    for what, count in (
        ("scales that are NaN, infinite or negative", sum(fact.bad_scales > 0 for fact in facts)),
        ("scales of zero", sum(fact.zero_scales > 0 for fact in facts)),
        ("codes that mean NaN or infinity", sum(fact.nonfinite_codes > 0 for fact in facts)),
        ("zeros only", sum(fact.zero_codes == 1 for fact in facts)),
    ):
        if count:
            notes.append(f"{count} of {len(facts)} modules have {what}")
    if kv_scales_all_one(packed):
        notes.append(KV_ALL_ONE)
    return notes


KV_ALL_ONE = (
    "every scale of the KV cache is exactly 1, as exporters write that lost the calibration"
)


def kv_scales_all_one(packed: PackedCheckpoint) -> bool:
    """Whether there are KV scales and none of them says anything."""
    kv = packed.contents.kv
    if kv is None:
        return False
    return all(bool((packed.checkpoint.read(tensor.name) == 1).all()) for tensor in kv.tensors)
