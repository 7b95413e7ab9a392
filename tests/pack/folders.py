"""Small checkpoints on disk, whole and damaged, for the tests of packing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping


def raw_file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file laid out as safetensors, with any header and any stated length of it."""
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """A header's entry for one tensor."""
    shape = list(shape) if isinstance(shape, tuple) else shape
    offsets = list(offsets) if isinstance(offsets, tuple) else offsets
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(**entries: Any) -> bytes:
    """A header as JSON; ``__`` in a name is a dot."""
    return json.dumps({name.replace("__", "."): value for name, value in entries.items()}).encode()


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A model folder: one file, or several with an index, and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; NaN equals itself and -0 is not 0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_one_sentence(message: str, *names: Any) -> None:
    """One line with the names in it, the rule, what was found, and what to do."""
    assert "\n" not in message and len(message) < 700
    assert all(str(name) in message for name in names)
    assert re.search(r"\b(must|needs?|needed|holds|expected)\b", message), message
    assert ", found" in message, message
    assert message.count("; ") >= 1, message
