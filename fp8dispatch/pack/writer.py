"""Writing safetensors files piece by piece, in any order and from several threads.

The header is written first, from names, dtypes and shapes alone; each tensor's bytes then go
straight to their place, so nothing is held in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.checkpoint import FileTensor
from fp8dispatch.pack.header import DTYPES, TensorSpec, encode_header
from fp8dispatch.pack.rawio import memory_of, read_into, write_at

if TYPE_CHECKING:
    import torch

COPY_BYTES = 8 << 20
"""How much of a tensor that is copied unchanged is in memory at a time."""


class ShardWriter:
    """A safetensors file under construction.

    Args:
        path: where to write; an existing file is overwritten.
        specs: every tensor that the file will hold.
        metadata: strings for ``__metadata__``.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        head, self._offsets = encode_header(specs, metadata)
        self._specs = {spec.name: spec for spec in specs}
        self._missing = {spec.name: spec.nbytes for spec in specs}
        self._lock = threading.Lock()
        self.path = path
        self.file_bytes = len(head) + sum(self._missing.values())
        try:
            with path.open("wb", buffering=0) as file:
                file.write(head)
                file.truncate(self.file_bytes)
        except OSError as error:
            raise CheckpointError(
                f"{path}: the file must be writable, found: {error.strerror or error}; check the "
                f"folder and the free space"
            ) from error

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """Write part of a tensor; each element must be written once.

        Args:
            name: a tensor of the file.
            values: contiguous on the CPU, of the tensor's dtype; any shape.
            start: its first element's place in the flattened tensor.

        Raises:
            CheckpointError: another dtype, more than the tensor holds, or a write that fails.
        """
        spec = self._specs[name]
        if values.dtype != DTYPES[spec.dtype].torch:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} was announced as {spec.dtype}, found "
                f"{values.dtype}; nothing was written"
            )
        self._write(name, start * values.dtype.itemsize, memory_of(values))

    def copy(self, source: FileTensor, name: str | None = None) -> None:
        """Copy a tensor of a checkpoint byte by byte, `COPY_BYTES` at a time.

        Raises:
            CheckpointError: other bytes than the file has place for, or a read or write that fails.
        """
        buffer = memoryview(bytearray(min(COPY_BYTES, source.nbytes)))
        for done in range(0, source.nbytes, COPY_BYTES):
            piece = buffer[: min(COPY_BYTES, source.nbytes - done)]
            read_into(source.path, source.offset + done, piece)
            self._write(name or source.name, done, piece)

    def check_complete(self) -> None:
        """Every byte of every tensor was written.

        Raises:
            CheckpointError: a tensor of which a part is missing.
        """
        for name, missing in self._missing.items():
            if missing:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} must be written whole, found {missing} bytes "
                    f"missing; the file was not published"
                )

    def _write(self, name: str, offset: int, piece: memoryview) -> None:
        with self._lock:
            self._missing[name] -= len(piece)
            fits = self._missing[name] >= 0 and offset + len(piece) <= self._specs[name].nbytes
        if not fits:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} holds {self._specs[name].nbytes} bytes, found more "
                f"to be written; the file was not published"
            )
        write_at(self.path, self._offsets[name] + offset, piece)
