"""compressed-tensors (``quant_method: compressed-tensors``): tensor, channel, block and group.

``X.weight`` F8_E4M3 [N, K] and ``X.weight_scale``: [1] per tensor, [N, 1] per channel, the grid of
blocks, [N, K / g] for groups (uint8 exponents in MXFP8); ``X.input_scale`` [1] when activations are
static. All scales are multipliers. Sources: compressed_tensors.quantization (QuantizationArgs
forbids unknown keys), vLLM's CompressedTensorsW8A8Fp8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fp8dispatch.errors import CheckpointError, InvalidInputError
from fp8dispatch.pack.layouts.contract import JSON, Contents, Layout, PackedModule, StoredTensor
from fp8dispatch.pack.layouts.patterns import compile_pattern
from fp8dispatch.pack.layouts.shapes import (
    linear_skips,
    read_scheme_as,
    refuse_dtypes,
    simple_tensors,
)
from fp8dispatch.pack.scheme import SCHEMES, Activations, Scheme
from fp8dispatch.recipe import ROW, TENSOR, Granularity, Recipe, parse_block_size

_FORMAT, _MX_FORMAT = "float-quantized", "mxfp8-quantized"
_WRITTEN_AS = "0.20.0"
"""Version of compressed-tensors whose configuration this follows."""


class CompressedTensors(Layout):
    """The form that loads nearly everywhere."""

    name: ClassVar[str] = "compressed-tensors"

    def refuse(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[str, ...]:
        """See `Layout`."""
        if scheme.e8m0:
            mx = SCHEMES["mxfp8"]
            found = refuse_dtypes(self.name, scheme, ("uint8",))
            if scheme.recipe != mx.recipe:
                found.append(
                    f"compressed-tensors has E8M0 scales for groups of 32 only, found "
                    f"{scheme.recipe}; use hf or native"
                )
        else:
            found = refuse_dtypes(self.name, scheme)
        group = scheme.group_size
        if group is not None and shape[1] % group:
            found.append(
                f"compressed-tensors needs whole groups, found K = {shape[1]} with groups of "
                f"{group}; use channel scales, or native"
            )
        return tuple(found)

    def tensors(
        self, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        scale_shape = scheme.recipe.scale_shape(*shape)
        return simple_tensors(module, scheme, shape, scale="weight_scale", scale_shape=scale_shape)

    def config(self, contents: Contents) -> JSON:
        """See `Layout`. A single scheme targets every ``Linear`` that is not ignored; of several,
        the most frequent one does, and the others name their modules."""
        by_scheme: dict[Scheme, list[str]] = {}
        for name, module in contents.modules.items():
            by_scheme.setdefault(module.scheme, []).append(name)
        ordered = sorted(by_scheme.items(), key=lambda item: (len(item[1]), str(item[0])))
        groups: JSON = {}
        for scheme, names in ordered:
            # Exact names come before the class in every reader's search.
            last = scheme == ordered[-1][0]
            groups[f"group_{len(groups)}"] = {
                "targets": ["Linear"] if last else sorted(names),
                "format": _MX_FORMAT if scheme.e8m0 else _FORMAT,
                "weights": _weights(scheme),
                "input_activations": _input_activations(scheme),
                "output_activations": None,
            }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "version": _WRITTEN_AS,
            "global_compression_ratio": None,
            "config_groups": groups,
            "ignore": linear_skips(contents),
            "kv_cache_scheme": _kv_scheme(contents),
        }

    def claims(self, block: JSON) -> bool:
        """See `Layout`."""
        return block.get("quant_method") == "compressed-tensors"

    def read_scheme(self, block: JSON, files: Mapping[str, JSON], module: PackedModule) -> Scheme:
        """See `Layout`."""
        group_name, group = _group_for(block, module.name)
        weights = group.get("weights")
        if not isinstance(weights, dict) or (weights.get("num_bits"), weights.get("type")) != (
            8,
            "float",
        ):
            raise CheckpointError(
                f"config_groups.{group_name} must describe 8-bit float weights, as "
                f"{module.name}.weight is FP8, found {weights!r:.120}; correct the configuration"
            )
        recipe, said = _recipe_of(weights, group_name)
        scheme = read_scheme_as(module, (recipe,), said)
        inputs = group.get("input_activations")
        if inputs is None and scheme.activations is Activations.DYNAMIC:
            return Scheme(recipe, scheme.dtype, scheme.scale_dtype, Activations.NONE)
        static = isinstance(inputs, dict) and not inputs.get("dynamic", False)
        if static and scheme.activations is not Activations.STATIC:
            raise CheckpointError(
                f"{module.name} needs an input_scale, as config_groups.{group_name} says its "
                f"activations are static, found none; take the complete checkpoint"
            )
        return scheme


def _weights(scheme: Scheme) -> JSON:
    arguments: JSON = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "group_size": scheme.group_size,
        "block_structure": None,
        "observer": "memoryless_minmax",
    }
    size = scheme.recipe.block_size
    if scheme.group_size is not None:
        arguments["strategy"] = "group"
    elif size is not None:
        arguments |= {"strategy": "block", "block_structure": list(size)}
    else:
        tensor = scheme.recipe.granularity is Granularity.TENSOR
        arguments["strategy"] = "tensor" if tensor else "channel"
    if scheme.e8m0:
        arguments["scale_dtype"] = "torch.uint8"
    return arguments


def _input_activations(scheme: Scheme) -> JSON | None:
    if scheme.activations is Activations.NONE:
        return None
    arguments: JSON = {"num_bits": 8, "type": "float", "symmetric": True}
    if scheme.activations is Activations.STATIC:
        return arguments | {"strategy": "tensor", "dynamic": False, "observer": "static_minmax"}
    arguments |= {"dynamic": True, "observer": None}
    size = scheme.recipe.block_size
    if size is None:
        return arguments | {"strategy": "token"}
    arguments |= {"strategy": "group", "group_size": size[1]}
    return arguments | ({"scale_dtype": "torch.uint8"} if scheme.e8m0 else {})


def _kv_scheme(contents: Contents) -> JSON | None:
    if contents.kv is None:
        return None
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": "tensor" if contents.kv.heads is None else "attn_head",
    }


def _group_for(block: JSON, module: str) -> tuple[str, JSON]:
    """The group of ``config_groups`` that a module falls into: by name, by pattern, by class."""
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(
            "quantization_config of compressed-tensors needs config_groups, found "
            f"{groups!r:.80}; correct config.json"
        )
    by_class = None
    for name, group in groups.items():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(item, str) for item in targets):
            raise CheckpointError(
                f"config_groups.{name} needs targets, a list of names, found {targets!r:.80}; "
                f"correct config.json"
            )
        for target in targets:
            if target == module or (target.startswith("re:") and _matches(target[3:], module)):
                return name, group
            if "." not in target and not target.startswith("re:"):
                by_class = by_class or (name, group)
    if by_class is None:
        raise CheckpointError(
            f"{module}.weight is FP8 and must be a target in config_groups, found none that fits; "
            f"correct config.json"
        )
    return by_class


def _matches(pattern: str, module: str) -> bool:
    try:
        return compile_pattern(pattern).matches(module)
    except InvalidInputError as error:
        raise CheckpointError(
            f"a target 're:...' in config_groups must be an expression of the kind that is matched "
            f"here: {error}; name the modules, or correct config.json"
        ) from error


def _recipe_of(weights: JSON, group_name: str) -> tuple[Recipe, str]:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    said = f"strategy {strategy!r}"
    try:
        if strategy == "tensor":
            return TENSOR, said
        if strategy == "channel":
            return ROW, said
        if strategy == "block" and weights.get("block_structure") is not None:
            structure = parse_block_size(weights["block_structure"])
            return Recipe(Granularity.BLOCK, structure), f"{said} {structure}"
        if strategy == "group" and size is not None:
            return Recipe(Granularity.BLOCK, (1, size)), f"{said} of {size}"
    except InvalidInputError as error:
        raise CheckpointError(
            f"config_groups.{group_name}.weights is wrong: {error}; correct config.json"
        ) from error
    raise CheckpointError(
        f"config_groups.{group_name}.weights needs the strategy tensor, channel, block with a "
        f"block_structure or group with a group_size, found {strategy!r}; correct config.json"
    )
