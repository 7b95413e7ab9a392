"""Bytes between files and tensors without a copy in between, and files that are whole or absent."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fp8dispatch.errors import CheckpointError, DTypeError

if TYPE_CHECKING:
    import torch

_FREE = "free some space and run again"


@contextmanager
def disk_errors(path: Path, ability: str, remedy: str) -> Iterator[None]:
    """Turn what the operating system raises into a sentence.

    Args:
        path: the file or folder that is worked on.
        ability: what it must be, "readable" or "writable".
        remedy: what the user can do.

    Raises:
        CheckpointError: instead of any OSError in the block.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: the file must be {ability}, found: {error.strerror or error}; {remedy}"
        ) from error


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable; valid while the tensor lives."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise DTypeError(
            f"a tensor that goes to a file must be contiguous on the CPU, found "
            f"{list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
    if tensor.nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def read_into(path: Path, offset: int, target: memoryview) -> None:
    """Fill `target` from a place in a file.

    Raises:
        CheckpointError: the file cannot be read or ends too early.
    """
    done = 0
    with disk_errors(path, "readable", "check the disk"), path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < len(target):
            got = file.readinto(target[done:])
            if not got:
                raise CheckpointError(
                    f"{path}: {len(target)} bytes were expected at {offset}, found {done}; the "
                    f"file was changed while it was read, begin again"
                )
            done += got


def write_at(path: Path, offset: int, source: memoryview | bytes) -> None:
    """Write all of `source` at a place in an existing file.

    Raises:
        CheckpointError: the file cannot be written, a full disk say.
    """
    rest = memoryview(source)
    with disk_errors(path, "writable", _FREE), path.open("r+b", buffering=0) as file:
        file.seek(offset)
        while rest:
            rest = rest[file.write(rest) :]


def write_whole(temporary: Path, final: Path, content: bytes | Path) -> None:
    """Write a small file, or copy one, so that it is whole under its final name or not there.

    Args:
        temporary: on the same disk; overwritten.
        final: its name; missing folders are made.
        content: the bytes, or the file to copy.

    Raises:
        CheckpointError: a file that cannot be read or written.
    """
    with disk_errors(final, "writable", _FREE):
        final.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, temporary)
        else:
            temporary.write_bytes(content)
    publish(temporary, final)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete file its final name: after its bytes, before anything that counts on it.

    Raises:
        CheckpointError: the disk refuses.
    """
    with disk_errors(final, "writable", _FREE):
        _sync(temporary)
        temporary.replace(final)
        _sync(final.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders; its renames are in the journal
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
