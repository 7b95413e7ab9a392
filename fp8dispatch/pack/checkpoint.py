"""Reading a checkpoint: which tensors it has and where, and strips of them with bounded memory.

A checkpoint is one ``.safetensors`` file, or a folder with ``config.json`` and one file or an index
over several; a folder may be a snapshot in the hub's cache, whose entries are links into ``blobs``.
Opening reads headers and JSON only, and checks all of them. No code of a checkpoint is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from fp8dispatch import gguf
from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.header import DTYPES, Header, TensorSpec, read_header
from fp8dispatch.pack.jsonfiles import read_model, read_object
from fp8dispatch.pack.rawio import memory_of, read_into

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OTHER_WEIGHTS = (*PICKLES, ".h5", ".msgpack", ".onnx", gguf.SUFFIX, ".ot")
_MAX_CONFIG_BYTES = 8 << 20
_CONVERT = (
    "load it with torch.load(path, weights_only=True) and write it with safetensors.torch.save_file"
)


class Index(BaseModel):
    """``model.safetensors.index.json``: which file holds each tensor."""

    model_config = ConfigDict(extra="ignore", strict=True)

    weight_map: dict[str, str] = Field(min_length=1)


@dataclass(frozen=True)
class FileTensor(TensorSpec):
    """A tensor and where its bytes are.

    Attributes:
        name, dtype, shape: as in `TensorSpec`.
        file: name of the file inside the checkpoint.
        path: the file itself, links resolved.
        offset: where its bytes begin in the file.
    """

    file: str
    path: Path
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint; tensors are read on demand.

    Attributes:
        folder: the folder that holds it.
        headers: file name -> its header, in the order of names.
        paths: file name -> the file itself, links resolved.
        index: name of the index file, or None for a single file.
        config: content of ``config.json``, or None where there is none.
    """

    folder: Path
    headers: Mapping[str, Header]
    paths: Mapping[str, Path]
    index: str | None
    config: Mapping[str, Any] | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read and check every header of a checkpoint.

        Args:
            path: a ``.safetensors`` file, a model folder, or a model's folder in the hub's cache
                (``models--owner--name``).

        Raises:
            CheckpointError: anything that is missing, damaged, contradictory or unsafe.
        """
        given = Path(path)
        if not given.exists():
            raise CheckpointError(
                f"{given}: a checkpoint must be an existing folder or file, found nothing there; "
                f"check the path"
            )
        if given.is_file():
            _refuse_other_forms(given)
            return cls(
                given.parent,
                {given.name: read_header(given)},
                {given.name: given.resolve()},
                None,
                _config(given.parent),
            )
        folder = _snapshot(given)
        index, files = _files(folder)
        paths = {name: resolve_inside(folder, name) for name in sorted(files)}
        headers = {name: read_header(found) for name, found in paths.items()}
        opened = cls(folder, headers, paths, index, _config(folder))
        _ = opened.tensors  # no name may stand in two files
        for tensor, file in (files_of(folder, index) if index else {}).items():
            if tensor not in headers[file].specs:
                raise CheckpointError(
                    f"{folder / index if index else folder}: tensor {tensor!r} must be in {file}, "
                    f"found none of that name there; fetch both files again"
                )
        return opened

    @cached_property
    def tensors(self) -> dict[str, FileTensor]:
        """Every tensor by name, in the order of files and of data."""
        found: dict[str, FileTensor] = {}
        for file, header in self.headers.items():
            for name, spec in header.specs.items():
                if name in found:
                    raise CheckpointError(
                        f"{self.folder / file}: tensor {name!r} must be in one file, found it in "
                        f"{found[name].file} as well; delete the file that the index does not name"
                    )
                found[name] = FileTensor(
                    name, spec.dtype, spec.shape, file, self.paths[file], header.offsets[name]
                )
        return found

    def tensor(self, name: str) -> FileTensor:
        """One tensor's place.

        Raises:
            CheckpointError: no tensor has this name.
        """
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"{self.folder}: a tensor {name!r} was expected, found none of that name among "
                f"{len(self.tensors)}; the checkpoint is not complete"
            )
        return found

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU.

        Raises:
            CheckpointError: no such tensor, or a dtype that torch has not.
        """
        return read_tensor(self.tensor(name))

    def strips(self, name: str, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """A matrix as strips of at most `rows` rows: the first row of each, and its values."""
        tensor = self.tensor(name)
        for start in range(0, tensor.shape[0], rows):
            yield start, read_rows(tensor, start, min(start + rows, tensor.shape[0]))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def other_files(self) -> list[tuple[str, Path]]:
        """What belongs to the model and is no weight of it: its relative name and its path.

        Left out are weights in every format, the index and ``config.json`` (they are written
        anew), and hidden files. A ``.safetensors`` file in a subfolder belongs to another part of
        a pipeline and is kept.

        Raises:
            CheckpointError: a link that leads out of the checkpoint.
        """
        kept: list[tuple[str, Path]] = []
        for root, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in sorted(files):
                name = (Path(root) / file).relative_to(self.folder).as_posix()
                top = "/" not in name
                weights = (*_OTHER_WEIGHTS, ".safetensors") if top else _OTHER_WEIGHTS
                replaced = top and (file == CONFIG or file.endswith(INDEX_SUFFIX))
                if file.startswith(".") or file.endswith((*weights, ".bin.index.json")) or replaced:
                    continue
                kept.append((name, resolve_inside(self.folder, name)))
        return kept


def read_tensor(tensor: FileTensor) -> torch.Tensor:
    """A whole tensor on the CPU.

    Raises:
        CheckpointError: the file cannot be read, or torch has no such dtype.
    """
    values = torch.empty(tensor.shape, dtype=_torch_dtype(tensor))
    read_into(tensor.path, tensor.offset, memory_of(values))
    return values


def read_rows(tensor: FileTensor, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` (the first dimension) of a tensor, and no more of the file.

    Raises:
        CheckpointError: the file cannot be read, or torch has no such dtype.
    """
    values = torch.empty((stop - start, *tensor.shape[1:]), dtype=_torch_dtype(tensor))
    row_bytes = tensor.nbytes // tensor.shape[0]
    read_into(tensor.path, tensor.offset + start * row_bytes, memory_of(values))
    return values


def part_of(tensor: FileTensor, index: int) -> FileTensor:
    """One entry along the first dimension, such as one expert of [E, N, K], as a tensor.

    Its bytes are where they were; nothing is read.
    """
    inner = replace(tensor, shape=tensor.shape[1:])
    return replace(inner, offset=tensor.offset + index * inner.nbytes)


def _torch_dtype(tensor: FileTensor) -> torch.dtype:
    dtype = DTYPES[tensor.dtype].torch
    if dtype is None:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} must have a dtype of torch to be read, found "
            f"{tensor.dtype}; convert it first"
        )
    return dtype


def resolve_inside(folder: Path, name: str) -> Path:
    """A file of a folder, links resolved: inside the folder, or a blob of the hub's cache.

    Raises:
        CheckpointError: the file is missing, or its link leads anywhere else.
    """
    path = folder / name
    try:
        found = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the file must exist, found: {getattr(error, 'strerror', None) or error}; "
            f"fetch the checkpoint again"
        ) from error
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not found.is_relative_to(home) and found.parent != blobs:
        raise CheckpointError(
            f"{path}: a link must lead to a file of the same folder or to a blob of the hub's "
            f"cache, found {found}; put the file itself into the folder"
        )
    return found


def files_of(folder: Path, index: str) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor -> plain name of a safetensors file.

    Raises:
        CheckpointError: an index that cannot be read or names anything but files beside it.
    """
    path = resolve_inside(folder, index)
    weight_map = read_model(path, Index).weight_map
    for tensor, file in weight_map.items():
        if not is_plain_name(file):
            raise CheckpointError(
                f"{folder / index}: tensor {tensor[:200]!r} must be in a file beside the index, "
                f"found {file[:200]!r}; correct the index"
            )
        _refuse_other_forms(folder / file)
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / index}: tensor {tensor[:200]!r} must be in a .safetensors file, found "
                f"{file[:200]!r}; convert the checkpoint to safetensors"
            )
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether a file name stays in its folder on every operating system."""
    printable = name.isprintable() and len(name) <= 255
    return printable and name not in ("", ".", "..") and not set(name) & set("/\\:")


def _snapshot(given: Path) -> Path:
    """The folder with the files: a model's folder of the hub's cache leads to its main snapshot."""
    reference = given / "refs" / "main"
    if not ((given / "snapshots").is_dir() and reference.is_file()):
        return given
    revision = reference.read_text(encoding="utf-8", errors="replace")[:256].strip()
    if not is_plain_name(revision) or not (given / "snapshots" / revision).is_dir():
        raise CheckpointError(
            f"{reference}: the name of a snapshot was expected, found {revision!r}; fetch the "
            f"model again"
        )
    return given / "snapshots" / revision


def _files(folder: Path) -> tuple[str | None, set[str]]:
    """The index, if there is one, and the weight files that belong to the checkpoint."""
    names = sorted(entry.name for entry in folder.iterdir())
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if INDEX in indexes or len(indexes) == 1:
        index = INDEX if INDEX in indexes else indexes[0]
        return index, set(files_of(folder, index).values())
    files = [name for name in names if name.endswith(".safetensors")]
    if WEIGHTS in files:
        return None, {WEIGHTS}
    if len(files) == 1:
        return None, {files[0]}
    pickles = [name for name in names if name.endswith(PICKLES) and name != "training_args.bin"]
    others = [*pickles, *(name for name in names if name.endswith(gguf.SUFFIX))]
    if not files and others:
        _refuse_other_forms(folder / others[0])
    raise CheckpointError(
        f"{folder}: a checkpoint needs {INDEX}, {WEIGHTS} or a single .safetensors file, found "
        f"{len(files)} of them and {len(indexes)} indexes; name one file"
    )


def _refuse_other_forms(path: Path) -> None:
    if path.name.endswith(gguf.SUFFIX):
        raise CheckpointError(
            f"{path}: weights must be in safetensors files, found GGUF, which holds blocks that "
            f"are quantised already; {gguf.remedy(path.name)}"
        )
    if path.name.endswith(PICKLES):
        raise CheckpointError(
            f"{path}: weights must be in safetensors files, found a pickle, which can run code "
            f"when it is loaded; {_CONVERT}"
        )


def _config(folder: Path) -> dict[str, Any] | None:
    if not (folder / CONFIG).exists():
        return None
    return read_object(resolve_inside(folder, CONFIG), _MAX_CONFIG_BYTES)
