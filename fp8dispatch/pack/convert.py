"""`convert`: a packed checkpoint into another format, where both hold the very same numbers.

Codes are copied byte by byte, scales are renamed, reshaped and stored in a dtype that holds them
exactly. What would need new codes or other scales is refused: unpack and pack again for that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.header import TensorSpec
from fp8dispatch.pack.jsonfiles import to_bytes
from fp8dispatch.pack.layouts import codec
from fp8dispatch.pack.layouts.catalog import get_layout
from fp8dispatch.pack.layouts.contract import (
    Contents,
    KVScales,
    Layout,
    PackedModule,
    Role,
    StoredTensor,
)
from fp8dispatch.pack.output import OutputFolder, OutputShard, source_fingerprint
from fp8dispatch.pack.packed import PackedCheckpoint
from fp8dispatch.pack.scheme import Activations, Scheme
from fp8dispatch.pack.unpack import PACKED_ONLY_FILES, plain_config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Converted:
    """What `convert` did.

    Attributes:
        source, target: names of the formats.
        modules: how many quantised modules the result holds.
        notes: what a user should know, such as a format that states no activation scheme.
    """

    source: str
    target: str
    modules: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Origin:
    """Where a stored tensor of the result comes from: a tensor of the source, as it is or decoded
    and encoded anew."""

    target: StoredTensor
    source: str
    module: PackedModule | None  # None for a scale of the KV cache


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: str,
    *,
    resume: bool = True,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Converted:
    """Write a packed checkpoint in another format, without changing a single number.

    Args:
        source: a packed folder, in any format that `read_contents` knows.
        out: the folder to write; outside the source, new or empty.
        layout: name of a format: compressed-tensors, hf, modelopt, fbgemm or native.
        resume: take up a conversion that was killed.
        force: replace what is in `out`.
        progress: called with (done, of, file name) before each file.

    Raises:
        InvalidInputError: an unknown format.
        CheckpointError: a source that is damaged, or that the format cannot hold; nothing is
            written then.
    """
    target = get_layout(layout)
    packed = PackedCheckpoint.open(source)
    contents = _converted_contents(packed, target)
    origins = {
        origin.target.name: origin
        for origin in (*_module_origins(packed, contents), *_kv_origins(packed, contents, target))
    }
    shards = _shards(packed, origins)
    fingerprint = f"convert {target.name} {source_fingerprint(packed.checkpoint)}"
    with OutputFolder(
        Path(out), packed.checkpoint, shards, fingerprint, resume=resume, force=force
    ) as output:
        for number, shard in enumerate(pending := output.pending()):
            if progress is not None:
                progress(number, len(pending), shard.file)
            with output.shard(shard) as writer:
                for spec in shard.specs:
                    origin = origins.get(spec.name)
                    if origin is None:
                        writer.copy(packed.checkpoint.tensor(spec.name))
                    elif origin.target.role is Role.WEIGHT:
                        writer.copy(packed.checkpoint.tensor(origin.source), spec.name)
                    else:
                        writer.write(spec.name, _scale(packed, origin))
        config = plain_config(packed.checkpoint.config) or {}
        config["quantization_config"] = target.config(contents)
        extra = {name: to_bytes(file) for name, file in target.extra_files(contents).items()}
        output.finish(config, extra, leave_out=PACKED_ONLY_FILES)
    return Converted(
        packed.contents.layout, target.name, len(contents.modules), _notes(packed, contents)
    )


def _converted_contents(packed: PackedCheckpoint, target: Layout) -> Contents:
    """The same modules as the target format describes them.

    Raises:
        CheckpointError: the first module that it cannot hold, or a mixture that it cannot state.
    """
    modules = {}
    for name, module in packed.contents.modules.items():
        scheme = _scheme_in(target, module)
        modules[name] = replace(
            module,
            scheme=scheme,
            tensors=target.tensors(name, scheme, module.shape),
        )
    contents = replace(packed.contents, modules=modules, layout=target.name, notes=())
    refusals = target.refuse_contents(contents)
    if refusals:
        raise CheckpointError(f"{packed.checkpoint.folder}: {refusals[0]}")
    return contents


def _scheme_in(target: Layout, module: PackedModule) -> Scheme:
    """The scheme with the same codes and scale values that the target holds: as it is, with the
    scales in a wider dtype, or with activations that are quantised when the format says so."""
    scheme = module.scheme
    candidates = [scheme, replace(scheme, scale_dtype="float32")]
    if scheme.activations is not Activations.STATIC:
        other = (
            Activations.NONE if scheme.activations is Activations.DYNAMIC else Activations.DYNAMIC
        )
        candidates += [replace(candidate, activations=other) for candidate in tuple(candidates)]
    for candidate in candidates:
        if not target.refuse(candidate, module.shape):
            return candidate
    raise CheckpointError(
        f"{module.name} ({scheme}) needs another form than {target.name} has, found: "
        f"{target.refuse(candidates[-1], module.shape)[0]}; nothing was written"
    )


def _module_origins(packed: PackedCheckpoint, contents: Contents) -> Iterator[_Origin]:
    for name, module in contents.modules.items():
        before = packed.contents.modules[name]
        for tensor in module.tensors:
            role = tensor.role
            if role is Role.WEIGHT_SCALE_RECIPROCAL:
                role = Role.WEIGHT_SCALE
            source = before.tensor(role)
            if source is None:
                raise CheckpointError(
                    f"{packed.checkpoint.folder}: {name} needs a {role.value} to be written as "
                    f"{contents.layout}, found none; nothing was written"
                )
            yield _Origin(tensor, source.name, before)


def _kv_origins(packed: PackedCheckpoint, contents: Contents, target: Layout) -> Iterator[_Origin]:
    kv = contents.kv
    if kv is None:
        return
    for layer in kv.layers:
        for tensor in target.kv_tensors(layer, kv.heads):
            source = _kv_source(kv, layer, tensor.role)
            if source is None:
                raise CheckpointError(
                    f"{packed.checkpoint.folder}: {layer} needs a {tensor.role.value} beside its "
                    f"other scale of the KV cache, found none; take the complete checkpoint"
                )
            yield _Origin(tensor, source, None)


def _kv_source(kv: KVScales, layer: str, role: Role) -> str | None:
    return next(
        (
            tensor.name
            for tensor in kv.tensors
            if tensor.role is role and tensor.name.startswith(f"{layer}.")
        ),
        None,
    )


def _shards(packed: PackedCheckpoint, origins: dict[str, _Origin]) -> list[OutputShard]:
    """The source's shards with the new tensors; a scale goes where its weight is."""
    checkpoint = packed.checkpoint
    replaced = {
        tensor.name for module in packed.contents.modules.values() for tensor in module.tensors
    }
    if packed.contents.kv is not None:
        replaced.update(tensor.name for tensor in packed.contents.kv.tensors)
    specs: dict[str, list[TensorSpec]] = {
        file: [spec for name, spec in header.specs.items() if name not in replaced]
        for file, header in checkpoint.headers.items()
    }
    for origin in origins.values():
        anchor = origin.source if origin.module is None else origin.module.tensors[0].name
        tensor = origin.target
        specs[checkpoint.tensor(anchor).file].append(
            TensorSpec(tensor.name, tensor.dtype, tensor.shape)
        )
    return [
        OutputShard(file, tuple(specs[file]), header.metadata)
        for file, header in checkpoint.headers.items()
        if specs[file]
    ]


def _scale(packed: PackedCheckpoint, origin: _Origin) -> torch.Tensor:
    """A scale as the target stores it."""
    if origin.module is None:
        multipliers = packed.checkpoint.read(origin.source).float()
    elif origin.target.role is Role.ACTIVATION_SCALE:
        found = packed.activation_scale(origin.module)
        assert found is not None  # `_module_origins` found its tensor
        multipliers = found
    else:
        multipliers = packed.weight_scale(origin.module)
    return codec.encode(origin.target, multipliers)


def _notes(packed: PackedCheckpoint, contents: Contents) -> tuple[str, ...]:
    before, after = (
        {module.scheme.activations for module in modules.values()}
        for modules in (packed.contents.modules, contents.modules)
    )
    if before == after:
        return ()
    names = [" and ".join(sorted(kind.value for kind in kinds)) for kinds in (before, after)]
    return (f"activations were {names[0]} and are {names[1]} now, as {contents.layout} has it",)
