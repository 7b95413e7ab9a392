"""Scales of an FP8 key-value cache beside the weights: which tensors, where, with which values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fp8dispatch.pack.calibration import Calibration
from fp8dispatch.pack.checkpoint import Checkpoint
from fp8dispatch.pack.layouts.contract import KVScales, Layout, Role, StoredTensor

KV_CHOICES = ("layer", "head")


@dataclass(frozen=True)
class KVTensor:
    """One tensor of scales.

    Attributes:
        stored: its name, dtype and shape.
        file: the weight file that it goes into: that of its layer.
        values: the multipliers, one for the layer or one for each head.
    """

    stored: StoredTensor
    file: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class KVPlan:
    """The scales of every layer.

    Attributes:
        scales: layers and heads, as a configuration states them.
        tensors: what is written.
    """

    scales: KVScales
    tensors: tuple[KVTensor, ...]


def plan_kv(
    choice: str,
    checkpoint: Checkpoint,
    layout: Layout,
    calibration: Calibration | None,
    problems: list[str],
) -> KVPlan | None:
    """Plan the scales of the KV cache; what stands against them is added to `problems`.

    Args:
        choice: one of `KV_CHOICES`: a scale for each layer, or for each head.
        checkpoint: the source, whose files say where a layer is.
        layout: the format, which names the tensors.
        calibration: holds the scales by attention module and head.
        problems: sentences so far.
    """
    found = {} if calibration is None else calibration.kv_scales
    if not found:
        problems.append(
            "scales of the KV cache need a calibration that measured it, found none; run "
            "fp8dispatch calibrate on this decoder, or drop --kv-scales"
        )
        return None
    counts = {len(one) for pair in found.values() for one in pair}
    if choice == "head" and len(counts) > 1:
        problems.append(
            f"scales for each head need equally many KV heads in all layers, found "
            f"{sorted(counts)}; use --kv-scales layer"
        )
        return None
    heads = min(counts) if choice == "head" else None
    tensors: list[KVTensor] = []
    for layer, pair in found.items():
        file = _file_of(layer, checkpoint)
        if file is None:
            problems.append(
                f"{checkpoint.folder}: the calibration's attention layer {layer!r} must have "
                f"tensors in the source, found none; calibrate this model"
            )
            continue
        tensors += _of_layer(layout.kv_tensors(layer, heads), file, pair, heads)
    return KVPlan(KVScales(tuple(found), heads), tuple(tensors))


def _of_layer(
    stored: tuple[StoredTensor, ...],
    file: str,
    pair: tuple[tuple[float, ...], tuple[float, ...]],
    heads: int | None,
) -> list[KVTensor]:
    by_role: Mapping[Role, tuple[float, ...]] = {Role.K_SCALE: pair[0], Role.V_SCALE: pair[1]}
    return [
        KVTensor(
            tensor,
            file,
            by_role[tensor.role] if heads is not None else (max(by_role[tensor.role]),),
        )
        for tensor in stored
    ]


def _file_of(layer: str, checkpoint: Checkpoint) -> str | None:
    return next(
        (
            tensor.file
            for name, tensor in checkpoint.tensors.items()
            if name.startswith(f"{layer}.")
        ),
        None,
    )
