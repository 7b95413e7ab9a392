"""What a checkpoint holds, from its configuration and tensor headers alone.

Scales are found by name beside each FP8 weight, wherever their shard is. Names that others use:

| meaning          | names beside ``X.weight``                                       |
|------------------|-----------------------------------------------------------------|
| weight scale     | weight_scale_inv, weight_scale, qscale_weight, scale            |
| activation scale | activation_scale, input_scale, act_scale, qscale_act            |

All of them are multipliers, ``weight_scale_inv`` and ``scale`` (DeepSeek-V4) included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.layouts.catalog import LAYOUTS
from fp8dispatch.pack.layouts.contract import (
    JSON,
    Contents,
    KVScales,
    Layout,
    PackedModule,
    Role,
    StoredTensor,
)
from fp8dispatch.pack.scheme import Scheme
from fp8dispatch.recipe import TENSOR

FP8_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")

SUFFIXES: dict[Role, tuple[str, ...]] = {
    Role.WEIGHT_SCALE: ("weight_scale_inv", "weight_scale", "qscale_weight", "scale"),
    Role.ACTIVATION_SCALE: ("activation_scale", "input_scale", "act_scale", "qscale_act"),
    Role.WEIGHT_SCALE_RECIPROCAL: ("weight_scale_reciprocal",),
}
_KV_SUFFIXES: dict[str, tuple[Role, ...]] = {
    ".k_proj.k_scale": (Role.K_SCALE,),
    ".v_proj.v_scale": (Role.V_SCALE,),
    ".k_proj.output_scale": (Role.K_SCALE,),
    ".v_proj.output_scale": (Role.V_SCALE,),
    ".attn.k_scale": (Role.K_SCALE,),
    ".attn.v_scale": (Role.V_SCALE,),
    ".k_scale": (Role.K_SCALE,),
    ".v_scale": (Role.V_SCALE,),
    ".kv_scale": (Role.K_SCALE, Role.V_SCALE),
}
_PLACEHOLDER = Scheme(TENSOR)


class TensorHeader(NamedTuple):
    """What a file says of a tensor: safetensors' dtype name, shape, and the file's name."""

    dtype: str
    shape: tuple[int, ...]
    file: str = "the checkpoint"


Headers = Mapping[str, TensorHeader]


def quantization_block(config: Mapping[str, Any], files: Mapping[str, JSON]) -> JSON | None:
    """The block that says how a checkpoint is quantised, or None for one that is not.

    Looked for where vLLM does: ``quantization_config``, the same in ``text_config``,
    ``compression_config``, then the file ``hf_quant_config.json``.

    Raises:
        CheckpointError: the block is there, but is no JSON object.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    for where, block in (
        ("quantization_config", config.get("quantization_config")),
        ("text_config.quantization_config", nested),
        ("compression_config", config.get("compression_config")),
    ):
        if block is not None:
            if not isinstance(block, dict):
                raise CheckpointError(
                    f"{where} in config.json must be a JSON object, found {type(block).__name__}; "
                    f"correct config.json"
                )
            return block
    exported = files.get("hf_quant_config.json")
    if exported is None:
        return None
    inner = exported.get("quantization")
    if not isinstance(inner, dict):
        raise CheckpointError(
            "hf_quant_config.json must hold an object named quantization, found "
            f"{type(inner).__name__}; take the complete checkpoint"
        )
    return {"quant_method": "modelopt", **inner, "ignore": inner.get("exclude_modules", [])}


def find_layout(block: JSON) -> Layout:
    """The format that a block ``quantization_config`` belongs to.

    Raises:
        CheckpointError: none that is known here.
    """
    for layout in LAYOUTS.values():
        if layout.claims(block):
            return layout
    raise CheckpointError(
        f"quant_method must be fp8, mxfp8, compressed-tensors, fbgemm_fp8 or modelopt, or format "
        f"fp8dispatch, found {block.get('quant_method')!r:.80}; export the model in one of them"
    )


def read_contents(
    config: Mapping[str, Any], files: Mapping[str, JSON], headers: Headers
) -> Contents:
    """What a packed checkpoint holds.

    Args:
        config: the content of ``config.json``.
        files: the content of other JSON files by name (``hf_quant_config.json``,
            ``fp8dispatch.json``); those that are missing are left out.
        headers: every tensor of every shard by name.

    Raises:
        CheckpointError: the checkpoint is not quantised, in an unknown format, a scale is missing
            or of the wrong shape or dtype, or a scale has no FP8 weight.
    """
    block = quantization_block(config, files)
    if block is None:
        raise CheckpointError(
            "config.json must hold a quantization_config for a packed checkpoint, found none; "
            "this model is not quantised: pack it first"
        )
    layout = find_layout(block)
    modules: dict[str, PackedModule] = {}
    claimed: set[str] = set()
    for name, header in headers.items():
        if header.dtype not in FP8_DTYPES:
            continue
        module = _stored_module(name, header, headers)
        claimed.update(tensor.name for tensor in module.tensors)
        scheme = layout.read_scheme(block, files, module)
        modules[module.name] = replace(
            module, scheme=scheme, amax_history=layout.amax_history(files, module.name)
        )
    _refuse_orphans(headers, claimed)
    return Contents(modules, _skipped(block), _kv_scales(headers), layout.name, _notes(modules))


def _stored_module(name: str, header: TensorHeader, headers: Headers) -> PackedModule:
    dtype, shape, file = header
    module = name.removesuffix(".weight")
    if module == name or len(shape) != 2 or 0 in shape:
        raise CheckpointError(
            f"{name} in {file} must be a matrix [N, K] named X.weight to be read as FP8, found "
            f"{dtype} {list(shape)}; store fused experts as one matrix each"
        )
    tensors = [StoredTensor(name, Role.WEIGHT, dtype, shape)]
    for role, suffixes in SUFFIXES.items():
        found = [f"{module}.{suffix}" for suffix in suffixes if f"{module}.{suffix}" in headers]
        if len(found) > 1:
            raise CheckpointError(
                f"{name} in {file} needs one {role.value}, found {' and '.join(found)}; remove the "
                f"one that does not belong to it"
            )
        if found:
            tensors.append(_stored_scale(found[0], role, headers))
    if all(tensor.role is not Role.WEIGHT_SCALE for tensor in tensors):
        raise CheckpointError(
            f"{name} in {file} is {dtype} and needs a weight scale ({module}.weight_scale or "
            f"{module}.weight_scale_inv), found none in any file; take the complete checkpoint"
        )
    return PackedModule(module, (shape[0], shape[1]), _PLACEHOLDER, tuple(tensors))


def _stored_scale(name: str, role: Role, headers: Headers) -> StoredTensor:
    dtype, shape, file = headers[name]
    if dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{name} in {file} must be one of {', '.join(SCALE_DTYPES)} to be a scale, found "
            f"{dtype}; pack the model again from its source"
        )
    return StoredTensor(name, role, dtype, shape)


def _refuse_orphans(headers: Headers, claimed: set[str]) -> None:
    """A scale without its FP8 weight: the weight holds codes that were cast, or was replaced."""
    for name, header in headers.items():
        module, _, suffix = name.rpartition(".")
        weight = headers.get(f"{module}.weight")
        if name in claimed or suffix == "scale" or suffix not in SUFFIXES[Role.WEIGHT_SCALE]:
            continue
        if weight is None:
            raise CheckpointError(
                f"{name} in {header.file} is a scale and needs {module}.weight, found none in any "
                f"file; take the complete checkpoint"
            )
        raise CheckpointError(
            f"{name} in {header.file} is the scale of {module}.weight, which must be FP8 "
            f"({', '.join(FP8_DTYPES)}), found {weight.dtype} in {weight.file}, which may be codes "
            f"or values; take the complete checkpoint"
        )


def _kv_scales(headers: Headers) -> KVScales | None:
    tensors: list[StoredTensor] = []
    layers: dict[str, None] = {}
    heads: set[int | None] = set()
    for name, (dtype, shape, file) in headers.items():
        suffix = next((end for end in _KV_SUFFIXES if name.endswith(end)), None)
        if suffix is None:
            continue
        if dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(
                f"{name} in {file} must be F32, BF16 or F16 to be a scale of the KV cache, found "
                f"{dtype}; calibrate again"
            )
        layers[name.removesuffix(suffix)] = None
        count = prod(shape)
        heads.add(None if count == 1 else count)
        tensors.extend(StoredTensor(name, role, dtype, shape) for role in _KV_SUFFIXES[suffix])
    if not tensors:
        return None
    if len(heads) > 1:
        raise CheckpointError(
            f"scales of the KV cache must be all per layer or all for the same number of heads, "
            f"found {sorted(head or 1 for head in heads)} values; calibrate again"
        )
    return KVScales(tuple(layers), heads.pop(), tuple(tensors))


def _skipped(block: JSON) -> tuple[str, ...]:
    for key in ("modules_to_not_convert", "ignored_layers", "ignore"):
        names = block.get(key)
        if isinstance(names, list):
            return tuple(name for name in names if isinstance(name, str))
    return ()


def _notes(modules: Mapping[str, PackedModule]) -> tuple[str, ...]:
    if modules:
        return ()
    return (
        "config.json has a quantization_config, but no tensor is FP8: nothing is quantised here",
    )
