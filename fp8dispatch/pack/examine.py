"""What is in the tensors of a packed checkpoint: scales, codes, and how well they restore a weight.

Everything is measured in strips, and nothing raises for bad values: they are counted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from pydantic import BaseModel

from fp8dispatch.formats import decode_scale, max_value
from fp8dispatch.pack.experts import WeightSource
from fp8dispatch.pack.layouts.contract import PackedModule, Role
from fp8dispatch.pack.packed import PackedCheckpoint, nonfinite_codes, restore, strip_rows


class ModuleFacts(BaseModel):
    """What one quantised module holds.

    Attributes:
        name, shape: the module and its (N, K).
        scheme: how it is quantised, in words.
        weight_dtype, scale_dtype: safetensors' names.
        scale_name: name of the tensor that holds the weight scale.
        scales: how many scales there are.
        scale_min, scale_max: of the positive finite ones; None when there is none.
        zero_scales, bad_scales: how many are zero; NaN, infinite or negative.
        scale_bins: floor(log2(scale)) -> how many, of the positive finite ones.
        zero_codes: share of codes that are zero.
        full_codes: share of codes at the format's largest magnitude.
        nonfinite_codes: how many codes mean NaN or infinity.
        rms: root mean square of the restored values; None where codes or scales are bad.
        activation_scale: the static activation scale, if any.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    weight_dtype: str
    scale_dtype: str
    scale_name: str
    scales: int
    scale_min: float | None
    scale_max: float | None
    zero_scales: int
    bad_scales: int
    scale_bins: dict[int, int]
    zero_codes: float
    full_codes: float
    nonfinite_codes: int
    rms: float | None
    activation_scale: float | None


def examine(packed: PackedCheckpoint, module: PackedModule) -> ModuleFacts:
    """Measure one module.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    stored = next(tensor for tensor in module.tensors if tensor.role is Role.WEIGHT_SCALE)
    raw = packed.checkpoint.read(stored.name)
    scale = decode_scale(raw).reshape(module.scheme.recipe.scale_shape(*module.shape))
    good = scale[torch.isfinite(scale) & (scale > 0)]
    bad_scales = int((~torch.isfinite(scale) | (scale < 0)).sum())
    zero = full = nonfinite = 0
    energy = 0.0
    weight = module.tensors[0]
    for start, strip in packed.checkpoint.strips(weight.name, strip_rows(module)):
        nonfinite += nonfinite_codes(strip)
        wide = strip.float()
        zero += int((wide == 0).sum())
        full += int((wide.abs() == max_value(strip.dtype)).sum())
        energy += float(restore(module, strip, scale, start, torch.float32).double().square().sum())
    count = math.prod(module.shape)
    bins = Counter(torch.frexp(good).exponent.sub(1).flatten().tolist())
    static = module.tensor(Role.ACTIVATION_SCALE)
    return ModuleFacts(
        name=module.name,
        shape=module.shape,
        scheme=str(module.scheme),
        weight_dtype=weight.dtype,
        scale_dtype=stored.dtype,
        scale_name=stored.name,
        scales=scale.numel(),
        scale_min=float(good.min()) if good.numel() else None,
        scale_max=float(good.max()) if good.numel() else None,
        zero_scales=int((scale == 0).sum()),
        bad_scales=bad_scales,
        scale_bins=dict(sorted(bins.items())),
        zero_codes=zero / count,
        full_codes=full / count,
        nonfinite_codes=nonfinite,
        rms=math.sqrt(energy / count) if math.isfinite(energy) else None,
        activation_scale=None if static is None else _first(packed, static.name),
    )


def _first(packed: PackedCheckpoint, name: str) -> float:
    return float(decode_scale(packed.checkpoint.read(name)).reshape(-1)[0])


@dataclass(frozen=True)
class Fidelity:
    """How well a packed weight restores its source.

    Attributes:
        sqnr: signal to quantisation noise in decibels; infinite when equal.
        swapped_sqnr: the same if the stored scales are taken for their reciprocals.
        max_error: largest absolute difference.
    """

    sqnr: float
    swapped_sqnr: float
    max_error: float


def compare(packed: PackedCheckpoint, module: PackedModule, source: WeightSource) -> Fidelity:
    """Measure a module against the matrix [N, K] that it was quantised from.

    Raises:
        CheckpointError: codes or scales that are not finite, or a file that cannot be read.
    """
    scale = packed.weight_scale(module)
    reciprocal = torch.where(scale > 0, 1 / scale, scale)
    signal = noise = swapped = largest = 0.0
    for start, strip in packed.codes(module):
        wanted = source.read(start, start + len(strip)).double()
        error = restore(module, strip, scale, start, torch.float32).double() - wanted
        other = restore(module, strip, reciprocal, start, torch.float32).double() - wanted
        signal += float(wanted.square().sum())
        noise += float(error.square().sum())
        swapped += float(other.square().sum())
        largest = max(largest, float(error.abs().max()))
    return Fidelity(_decibels(signal, noise), _decibels(signal, swapped), largest)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)
