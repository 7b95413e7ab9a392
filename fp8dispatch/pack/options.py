"""What the user asks of packing, and what follows from it where nothing was asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from fp8dispatch.errors import InvalidInputError
from fp8dispatch.pack.kvcache import KV_CHOICES
from fp8dispatch.pack.layouts.catalog import get_layout
from fp8dispatch.pack.layouts.contract import Layout
from fp8dispatch.pack.layouts.loadability import TARGETS
from fp8dispatch.pack.scheme import (
    AMAX,
    FLOAT8_NAMES,
    MSE,
    SCALES,
    SCHEMES,
    Scheme,
    parse_scheme,
)
from fp8dispatch.recipe import TENSOR


class OnRagged(str, Enum):
    """What happens to a weight whose sides are no multiples of the blocks."""

    SKIP = "skip"  # it stays in high precision, with the layers that it is fused with
    CHANNEL = "channel"  # it takes channel scales instead, again with those layers
    PAD = "pad"  # its blocks at the edges are cropped, as if it was padded with zeros
    ERROR = "error"  # the plan fails


@dataclass(frozen=True)
class Preset:
    """A recipe, a format and an FP8 dtype that go together.

    Attributes:
        recipe: a name in `SCHEMES`.
        layout: name of the format.
        dtype: FP8 dtype.
    """

    recipe: str
    layout: str
    dtype: str = "float8_e4m3fn"


PRESETS: Mapping[str, Preset] = {
    # Codes, scales of groups, and the metadata of each tensor, for a run time that is still open.
    "cpu": Preset("group64", "native"),
    # The form that vLLM and Transformers load on Ada, Hopper and Blackwell.
    "nvidia": Preset("channel", "compressed-tensors"),
    # MI300 (gfx942) multiplies the FNUZ formats only, whose largest value is 240.
    "amd": Preset("channel", "native", "float8_e4m3fnuz"),
}
_OF_TARGET: Mapping[str, Preset] = {
    "vllm": Preset("channel", "compressed-tensors"),
    "transformers": Preset("channel", "compressed-tensors"),
    "here": Preset("block128", "native"),
}
_RECIPE_OF_LAYOUT: Mapping[str, str] = {
    "compressed-tensors": "channel",
    "hf": "block128",
    "modelopt": "tensor-static",
    "fbgemm": "channel",
    "native": "block128",
}
_LAYOUT_OF_RECIPE: Mapping[str, str] = {
    "channel": "compressed-tensors",
    "tensor-static": "compressed-tensors",
    "mxfp8": "compressed-tensors",
    "block128": "hf",
    "block128-ue8m0": "hf",
}


@dataclass(frozen=True)
class PackOptions:
    """Everything that decides how a checkpoint is packed. What is None follows from the rest.

    Attributes:
        recipe: a name in `SCHEMES`, such as ``"block128"``.
        layout: name of the on-disk format, such as ``"compressed-tensors"``.
        dtype: FP8 dtype of the weights, by its torch name.
        preset: ``"cpu"``, ``"nvidia"`` or ``"amd"``: recipe, format and dtype together.
        target: ``"vllm"``, ``"transformers"`` or ``"here"``: the plan fails where the result would
            not load there.
        tp: ranks of tensor parallelism in vLLM.
        skip: names or wildcards of modules that stay as they are.
        only: names or wildcards of the only modules to be quantised.
        on_ragged: what happens to weights that are no whole blocks.
        calibration: a JSON file of activation scales, for static activations.
        keep_master: also keep the source's weights, in the subfolder ``master``.
        kv_scales: ``"layer"`` or ``"head"``: also write the calibration's scales of the KV cache.
        scales: ``"amax"``: the largest value of a block becomes the largest code; ``"mse"``: of
            eight scales the one with the least squared error, for channels, groups and blocks
            with fp32 scales.
        keep_ends: so many layers at the beginning and at the end of the model stay as they are.
    """

    recipe: str | None = None
    layout: str | None = None
    dtype: str | None = None
    preset: str | None = None
    target: str | None = None
    tp: int = 1
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    on_ragged: OnRagged | str | None = None
    calibration: Path | None = None
    keep_master: bool = False
    kv_scales: str | None = None
    scales: str = AMAX
    keep_ends: int = 0


@dataclass(frozen=True)
class Resolved:
    """Options with every choice made.

    Attributes:
        asked: what was asked.
        scheme: how weights are quantised.
        recipe: the scheme's name.
        layout: the format.
        on_ragged: what happens to weights that are no whole blocks.
        targets: where the result is meant to load; for these it is checked against block edges.
    """

    asked: PackOptions
    scheme: Scheme
    recipe: str
    layout: Layout
    on_ragged: OnRagged
    targets: tuple[str, ...]


def resolve(asked: PackOptions) -> Resolved:
    """Make every choice that was left open.

    Raises:
        InvalidInputError: an unknown name, or values that no choice takes.
    """
    _check(asked)
    base = _base(asked)
    recipe = asked.recipe or (
        _RECIPE_OF_LAYOUT[get_layout(asked.layout).name] if asked.layout else base.recipe
    )
    dtype = asked.dtype or base.dtype
    scheme = replace(parse_scheme(recipe), dtype=dtype)
    chosen_for_recipe = asked.recipe is not None and asked.target is None and asked.preset is None
    layout_name = asked.layout or (
        _LAYOUT_OF_RECIPE.get(recipe, "native") if chosen_for_recipe else base.layout
    )
    if asked.layout is None and dtype != "float8_e4m3fn":
        layout_name = "native"
    layout = get_layout(layout_name)
    if asked.scales == MSE and (scheme.e8m0 or scheme.recipe == TENSOR):
        raise InvalidInputError(
            f"scales mse needs fp32 scales per channel, group or block to choose from, found "
            f"{scheme}; leave it out, or use the recipe channel"
        )
    targets = ("transformers", "vllm") if asked.target is None else (asked.target,)
    return Resolved(asked, scheme, recipe, layout, _on_ragged(asked, layout), targets)


def _base(asked: PackOptions) -> Preset:
    if asked.preset is not None:
        return PRESETS[asked.preset]
    return _OF_TARGET[asked.target or "vllm"]


def _on_ragged(asked: PackOptions, layout: Layout) -> OnRagged:
    if asked.on_ragged is not None:
        return OnRagged(asked.on_ragged)  # its name is taken as well
    if layout.name == "native" or asked.target == "here":
        return OnRagged.PAD
    if asked.target is None:
        return OnRagged.ERROR
    return OnRagged.CHANNEL if layout.name == "compressed-tensors" else OnRagged.SKIP


def _check(asked: PackOptions) -> None:
    choices: dict[str, tuple[str | None, Collection[str]]] = {
        "recipe": (asked.recipe, SCHEMES),
        "preset": (asked.preset, PRESETS),
        "target": (asked.target, TARGETS),
        "dtype": (asked.dtype, FLOAT8_NAMES),
        "kv_scales": (asked.kv_scales, KV_CHOICES),
        "on_ragged": (asked.on_ragged, [one.value for one in OnRagged]),
        "scales": (asked.scales, SCALES),
    }
    for what, (value, known) in choices.items():
        if value is not None and value not in known:
            raise InvalidInputError(f"{what} must be one of {', '.join(known)}, found {value!r}")
    if asked.layout is not None:
        get_layout(asked.layout)
    if asked.tp < 1:
        raise InvalidInputError(f"tp must be at least 1, found {asked.tp}")
    if asked.keep_ends < 0:
        raise InvalidInputError(f"keep_ends must be 0 or more, found {asked.keep_ends}")
    if asked.dtype is not None and "e5m2" in asked.dtype:
        raise InvalidInputError(
            f"weights are packed in float8_e4m3fn or float8_e4m3fnuz, found {asked.dtype}: E5M2 "
            f"has two bits of mantissa and is for gradients; quantise such tensors with "
            f"fp8dispatch.quantize"
        )
