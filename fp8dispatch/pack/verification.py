"""`verify`: whether a packed checkpoint is sound, and how well it restores its source."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import torch
from pydantic import BaseModel, ConfigDict

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.architectures import model_types
from fp8dispatch.pack.checkpoint import Checkpoint, resolve_inside
from fp8dispatch.pack.examine import ModuleFacts, compare, examine
from fp8dispatch.pack.experts import WeightSource, is_fused, split
from fp8dispatch.pack.inspection import KV_ALL_ONE, kv_scales_all_one
from fp8dispatch.pack.jsonfiles import read_object
from fp8dispatch.pack.layouts.contract import PackedModule, Role
from fp8dispatch.pack.packed import PackedCheckpoint

MIN_SQNR = {"F8_E4M3": 28.0, "F8_E4M3FNUZ": 28.0, "F8_E5M2": 22.0, "F8_E5M2FNUZ": 22.0}
"""Decibels below which something is wrong: E4M3 gives about 31.5 and E5M2 about 25.5 for any
weight that is not mostly outliers, at every granularity."""

_LARGE_RMS = 30.0
"""A restored weight larger than this, which its reciprocal scales would bring below it, has its
scales the wrong way round: weights of models are below 1, codes around 100."""

_COMPARED_BYTES = 8 << 20


class ModuleCheck(BaseModel):
    """How one module came out.

    Attributes:
        name: the module.
        sqnr: decibels against the source; None without one, or where it could not be measured.
        max_error: largest absolute difference from the source.
        failures: what is wrong with it, one sentence each.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")  # an equal tensor has infinite SQNR

    name: str
    sqnr: float | None
    max_error: float | None
    failures: list[str]


class Verification(BaseModel):
    """What `verify` found.

    Attributes:
        layout: name of the format; empty when the checkpoint could not be opened.
        modules: every quantised module.
        failures: everything that is wrong, those of the modules included.
        warnings: what is legal and probably not meant.
    """

    layout: str
    modules: list[ModuleCheck]
    failures: list[str]
    warnings: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    @property
    def worst_sqnr(self) -> float | None:
        """The smallest SQNR of all modules, if any was measured."""
        return min(
            (module.sqnr for module in self.modules if module.sqnr is not None), default=None
        )


def verify(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    min_sqnr: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Verification:
    """Check a packed checkpoint: its structure, every scale and code, and its SQNR.

    Args:
        path: a packed folder, in any format that `read_contents` knows.
        against: the checkpoint that it was packed from; its tensors have the same names.
        min_sqnr: decibels that each module must reach; None means `MIN_SQNR` of its dtype.
        progress: called with (done, of, module name) before each module.

    Returns:
        Everything that is wrong; nothing about the checkpoint raises.

    Raises:
        CheckpointError: `against` cannot be opened.
    """
    source = None if against is None else _Source(Checkpoint.open(against))
    try:
        packed = PackedCheckpoint.open(path)
    except CheckpointError as error:
        return Verification(layout="", modules=[], failures=[str(error)], warnings=[])
    modules = []
    chosen = list(packed.contents.modules.values())
    for number, module in enumerate(chosen):
        if progress is not None:
            progress(number, len(chosen), module.name)
        modules.append(_check_module(packed, module, source, min_sqnr))
    failures = [f"{module.name}: {text}" for module in modules for text in module.failures]
    failures += _structure(packed)
    if source is not None:
        failures += _others(packed, source)
    warnings = list(packed.contents.notes)
    if kv_scales_all_one(packed):
        warnings.append(KV_ALL_ONE)
    return Verification(
        layout=packed.contents.layout, modules=modules, failures=failures, warnings=warnings
    )


class _Source:
    """The checkpoint that a packed one came from, its matrices by module.

    Attributes:
        checkpoint: the checkpoint.
        weights: module -> its matrix [N, K]; fused experts are one module each.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.weights: dict[str, WeightSource] = {}
        self._parts: dict[str, tuple[str, ...]] = {}
        types = model_types(checkpoint.config)
        for name, tensor in checkpoint.tensors.items():
            if len(tensor.shape) == 2 and name.endswith(".weight"):
                self.weights[name.removesuffix(".weight")] = WeightSource(tensor)
            elif is_fused(tensor):
                try:
                    parts = split(tensor, types, checkpoint.config)
                except CheckpointError:
                    continue  # packing could not split it either: it is compared as it is
                self.weights |= parts
                self._parts[name] = tuple(parts)

    def is_split(self, name: str, packed: PackedCheckpoint) -> bool:
        """Whether a fused tensor is in the packed model, one module for each expert."""
        parts = self._parts.get(name, ())
        return bool(parts) and all(part in packed.contents.modules for part in parts)


def _check_module(
    packed: PackedCheckpoint,
    module: PackedModule,
    source: _Source | None,
    min_sqnr: float | None,
) -> ModuleCheck:
    facts = examine(packed, module)
    failures = list(_bad_values(packed, module, facts))
    if source is None:
        failures += _implausible(facts)
    elif not failures:
        return _measured(packed, module, source, min_sqnr)
    return ModuleCheck(name=module.name, sqnr=None, max_error=None, failures=failures)


def _bad_values(
    packed: PackedCheckpoint, module: PackedModule, facts: ModuleFacts
) -> Iterator[str]:
    if facts.bad_scales:
        yield (
            f"{facts.scale_name} must hold positive finite scales, found {facts.bad_scales} of "
            f"{facts.scales} that are NaN, infinite or negative; pack the model again"
        )
    if facts.nonfinite_codes:
        yield (
            f"{module.tensors[0].name} must hold finite codes, found {facts.nonfinite_codes} that "
            f"mean NaN or infinity; pack the model again from its source"
        )
    static = facts.activation_scale
    if static is not None and not (math.isfinite(static) and static > 0):
        yield f"its activation scale must be positive and finite, found {static}; calibrate again"
    reciprocal = module.tensor(Role.WEIGHT_SCALE_RECIPROCAL)
    if reciprocal is not None and not facts.bad_scales:
        stored = packed.checkpoint.read(reciprocal.name)
        wanted = 1.0 / packed.weight_scale(module)
        if stored.shape != wanted.shape or not torch.equal(stored, wanted):
            yield (
                f"{reciprocal.name} must be the reciprocal of {facts.scale_name}, found other "
                f"values; pack the model again"
            )


def _implausible(facts: ModuleFacts) -> list[str]:
    """Scales the wrong way round, as far as it shows without the source."""
    if facts.rms is None or facts.rms <= _LARGE_RMS or facts.scale_min is None:
        return []
    if facts.scale_min <= 1:
        return []
    return [
        f"{facts.scale_name} must be amax / 448, found values from {facts.scale_min:.4g} that "
        f"restore weights of {facts.rms:.4g} on average: these look like 448 / amax; store their "
        f"reciprocals"
    ]


def _measured(
    packed: PackedCheckpoint, module: PackedModule, source: _Source, min_sqnr: float | None
) -> ModuleCheck:
    weight = module.tensors[0]
    origin = source.weights.get(module.name)
    if origin is None or origin.shape != module.shape:
        found = "none of that name"
        if origin is not None:
            found = f"{origin.tensor.dtype} {list(origin.shape)}"
        failure = (
            f"{weight.name} must be in {source.checkpoint.folder} with shape {list(weight.shape)}, "
            f"found {found}; name the checkpoint that was packed"
        )
        return ModuleCheck(name=module.name, sqnr=None, max_error=None, failures=[failure])
    result = compare(packed, module, origin)
    wanted = MIN_SQNR[weight.dtype] if min_sqnr is None else min_sqnr
    failures = []
    if not result.sqnr >= wanted:
        hint = "pack the model again"
        if result.swapped_sqnr >= MIN_SQNR["F8_E5M2"]:
            hint = (
                f"the scales are the wrong way round (their reciprocals give "
                f"{result.swapped_sqnr:.1f} dB): store amax / 448"
            )
        failures.append(
            f"{weight.name} must restore its source with {wanted:g} dB, found {result.sqnr:.1f} "
            f"dB; {hint}"
        )
    return ModuleCheck(
        name=module.name, sqnr=result.sqnr, max_error=result.max_error, failures=failures
    )


def _structure(packed: PackedCheckpoint) -> Iterator[str]:
    """What the headers and the configuration contradict each other about."""
    checkpoint, contents = packed.checkpoint, packed.contents
    for name in contents.skipped:
        if name in contents.modules:
            yield (
                f"{name} must not be FP8, as config.json lists it among those left alone, found "
                f"{contents.modules[name].tensors[0].dtype}; correct config.json"
            )
    if checkpoint.index is not None:
        index = read_object(resolve_inside(checkpoint.folder, checkpoint.index))
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total is not None and total != checkpoint.total_bytes:
            yield (
                f"{checkpoint.index} must state the size of all tensors, "
                f"{checkpoint.total_bytes} bytes, found {total}; write the index again"
            )
    if contents.kv is not None:
        for tensor in contents.kv.tensors:
            values = checkpoint.read(tensor.name).float()
            if not bool((torch.isfinite(values) & (values > 0)).all()):
                yield (
                    f"{tensor.name} must hold positive finite scales of the KV cache, found "
                    f"{float(values.min())}; calibrate again"
                )


def _others(packed: PackedCheckpoint, origin: _Source) -> Iterator[str]:
    """Tensors that are not quantised must be those of the source, byte by byte."""
    source = origin.checkpoint
    own = {tensor.name for module in packed.contents.modules.values() for tensor in module.tensors}
    if packed.contents.kv is not None:
        own.update(tensor.name for tensor in packed.contents.kv.tensors)
    for name, tensor in packed.checkpoint.tensors.items():
        if name in own:
            continue
        wanted = source.tensors.get(name)
        if wanted is None:
            yield f"{name} must be in {source.folder}, found none of that name; pack again"
        elif (wanted.dtype, wanted.shape) != (tensor.dtype, tensor.shape):
            yield (
                f"{name} must be {wanted.dtype} {list(wanted.shape)} as in its source, found "
                f"{tensor.dtype} {list(tensor.shape)}; pack again"
            )
        elif not _same_bytes(packed.checkpoint, source, name):
            yield f"{name} must hold the bytes of its source, found others; pack again"
    for name in source.tensors:
        if name not in packed.checkpoint.tensors and not origin.is_split(name, packed):
            yield f"{name} of {source.folder} must be in the packed model, found none; pack again"


def _same_bytes(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    tensors = one.tensor(name), other.tensor(name)
    with tensors[0].path.open("rb") as left, tensors[1].path.open("rb") as right:
        left.seek(tensors[0].offset)
        right.seek(tensors[1].offset)
        for done in range(0, tensors[0].nbytes, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, tensors[0].nbytes - done)
            if left.read(size) != right.read(size):
                return False
    return True
