"""`unpack`: a packed checkpoint of any format back to bf16, fp16 or fp32, on a CPU, in strips."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fp8dispatch.checks import check_choice
from fp8dispatch.formats import ACTIVATION_DTYPES, dtype_name
from fp8dispatch.pack.header import stored_dtype
from fp8dispatch.pack.layouts.contract import Contents, Role
from fp8dispatch.pack.output import OutputFolder, OutputShard, source_fingerprint
from fp8dispatch.pack.packed import METADATA_FILES, PackedCheckpoint

PACKED_ONLY_FILES = (*METADATA_FILES, "fp8_report.json", "fp8_report.md", "fp8_report.png")
"""Files beside a packed checkpoint that say nothing true of what it is turned into."""

_BLOCKS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` did.

    Attributes:
        layout: the format that was read.
        modules: how many weights were restored.
        dropped: names of the scales of the KV cache, which an unpacked model has no use for.
        bytes_before, bytes_after: of all tensors.
    """

    layout: str
    modules: int
    dropped: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def unpack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    resume: bool = True,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Unpacked:
    """Restore the weights of a packed checkpoint, ``codes * scale`` rounded once to `dtype`.

    Tensors that are not quantised keep their dtype and bytes; shards keep their names. Memory is
    bounded by a strip of one weight.

    Args:
        source: a packed folder, in any format that `read_contents` knows.
        out: the folder to write; outside the source, new or empty.
        dtype: bfloat16, float16 or float32.
        resume: take up an unpacking that was killed.
        force: replace what is in `out`.
        progress: called with (done, of, file name) before each file.

    Raises:
        CheckpointError: a source that is damaged or not packed, a code or scale that is not
            finite, a value that `dtype` cannot hold, or a folder that cannot be written.
    """
    check_choice("dtype", dtype, ACTIVATION_DTYPES)
    packed = PackedCheckpoint.open(source)
    checkpoint, contents = packed.checkpoint, packed.contents
    weights = {module.tensors[0].name: module for module in contents.modules.values()}
    gone = _scales(contents)
    stored = stored_dtype(dtype)

    shards = []
    for file, header in checkpoint.headers.items():
        specs = tuple(
            replace(spec, dtype=stored) if name in weights else spec
            for name, spec in header.specs.items()
            if name not in gone
        )
        if specs:  # a shard of scales alone is left out
            shards.append(OutputShard(file, specs, header.metadata))
    fingerprint = f"unpack {dtype_name(dtype)} {source_fingerprint(checkpoint)}"
    with OutputFolder(
        Path(out), checkpoint, shards, fingerprint, resume=resume, force=force
    ) as output:
        for number, shard in enumerate(pending := output.pending()):
            if progress is not None:
                progress(number, len(pending), shard.file)
            with output.shard(shard) as writer:
                for spec in shard.specs:
                    module = weights.get(spec.name)
                    if module is None:
                        writer.copy(checkpoint.tensor(spec.name))
                        continue
                    for start, strip in packed.values(module, dtype):
                        writer.write(spec.name, strip, start=start * module.shape[1])
        output.finish(plain_config(checkpoint.config), leave_out=PACKED_ONLY_FILES)
    return Unpacked(
        contents.layout,
        len(weights),
        () if contents.kv is None else tuple(tensor.name for tensor in contents.kv.tensors),
        checkpoint.total_bytes,
        sum(spec.nbytes for shard in shards for spec in shard.specs),
    )


def _scales(contents: Contents) -> set[str]:
    """Names of the tensors that an unpacked model does not have."""
    names = {
        tensor.name
        for module in contents.modules.values()
        for tensor in module.tensors
        if tensor.role is not Role.WEIGHT
    }
    if contents.kv is not None:
        names.update(tensor.name for tensor in contents.kv.tensors)
    return names


def plain_config(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A ``config.json`` without what says that the model is quantised."""
    if config is None:
        return None
    plain = {key: value for key, value in config.items() if key not in _BLOCKS}
    text = plain.get("text_config")
    if isinstance(text, dict):
        plain["text_config"] = {key: text[key] for key in text if key not in _BLOCKS}
    return plain
