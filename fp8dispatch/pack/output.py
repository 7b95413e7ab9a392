"""The folder that a checkpoint is written into: locked, resumable, and complete or not there.

Each file is written under another name inside ``.fp8dispatch``, put on the disk, then renamed; the
index comes after the weights and ``config.json`` last, so a folder with a configuration is whole.
A job that was killed is taken up again when its fingerprint is the same: what has its final name,
its size and its header is done.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.checkpoint import CONFIG, INDEX_SUFFIX, Checkpoint
from fp8dispatch.pack.header import TensorSpec, encode_header
from fp8dispatch.pack.jsonfiles import read_model, to_bytes
from fp8dispatch.pack.rawio import disk_errors, publish, write_whole
from fp8dispatch.pack.writer import ShardWriter

JOURNAL = ".fp8dispatch"
_MANIFEST = "manifest.json"
_SPARE_BYTES = 16 << 20  # for the configuration, the report and the files that are copied


class Manifest(BaseModel):
    """What the journal says about the job that writes into a folder."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = 1
    fingerprint: str


@dataclass(frozen=True)
class OutputShard:
    """A weight file to be written.

    Attributes:
        file: its name in the folder; a name such as ``"master/model.safetensors"`` makes a
            subfolder, whose files are not part of the index.
        specs: its tensors.
        metadata: strings for its header; ``format`` is always ``pt``, which loaders ask for.
    """

    file: str
    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def header_strings(self) -> dict[str, str]:
        """What stands under ``__metadata__``."""
        return {**self.metadata, "format": "pt"}

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        head, _ = encode_header(self.specs, self.header_strings)
        return len(head) + sum(spec.nbytes for spec in self.specs)


class OutputFolder:
    """A folder being filled; use it as a context manager, which holds its lock.

    Args:
        path: the folder; made where it is missing.
        source: the checkpoint that is read, which is never written into.
        shards: every weight file of the result.
        fingerprint: what the result depends on; a killed job with the same one is resumed.
        resume: take a killed job up; False begins again.
        force: replace what is in the folder.

    Raises:
        CheckpointError: on entry: a folder that must not or cannot be written, too little space,
            another process at work in it, content that `force` would have to replace.
    """

    def __init__(
        self,
        path: Path,
        source: Checkpoint,
        shards: Sequence[OutputShard],
        fingerprint: str,
        *,
        resume: bool = True,
        force: bool = False,
    ) -> None:
        self.path = path
        self.source = source
        self.shards = tuple(shards)
        self.resumed = False
        self._fingerprint = fingerprint
        self._resume, self._force = resume, force
        self._journal = path / JOURNAL
        self._lock = FileLock(self._journal / "lock")

    def __enter__(self) -> OutputFolder:
        check_apart(self.path, self.source)
        content = _content(self.path)
        if content and not (self._journal / _MANIFEST).exists() and not self._force:
            # What a job leaves that was killed after its last file: all of the result is there.
            shutil.rmtree(self._journal, ignore_errors=True)
            raise CheckpointError(
                f"{self.path}: the output folder must be new or empty, found {content[0]} in it; "
                f"name another one, or use --force to replace a checkpoint there"
            )
        try:
            self._journal.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise CheckpointError(
                f"{self.path}: one process at a time may write into a folder, found another one at "
                f"work; wait for it or name another folder"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: the output folder must be writable, found: "
                f"{error.strerror or error}; name another one"
            ) from error
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
        if kind is None and not (self._journal / _MANIFEST).exists():
            shutil.rmtree(self._journal)

    def pending(self) -> list[OutputShard]:
        """The files that are still to be written."""
        return [shard for shard in self.shards if not self._is_done(shard)]

    @contextmanager
    def shard(
        self, shard: OutputShard, note: Mapping[str, Any] | None = None
    ) -> Iterator[ShardWriter]:
        """Write one file: it gets its name when the block ends without an error.

        Args:
            shard: one of the files of the job.
            note: filled in the block; kept beside the file for `note`, until the job is finished.
        """
        final = self.path / shard.file
        final.parent.mkdir(exist_ok=True)
        temporary = self._journal / f"{shard.file.replace('/', '+')}.partial"
        writer = ShardWriter(temporary, shard.specs, shard.header_strings)
        yield writer
        writer.check_complete()
        if note is not None:
            self._write(f"{JOURNAL}/{temporary.stem}.json", to_bytes(note))
        publish(temporary, final)

    def note_path(self, shard: OutputShard) -> Path:
        """Where the note of a finished file is, if it has one."""
        return self._journal / f"{shard.file.replace('/', '+')}.json"

    def finish(
        self,
        config: Mapping[str, Any] | None,
        extra_files: Mapping[str, bytes] | None = None,
        leave_out: Collection[str] = (),
    ) -> list[str]:
        """Copy the source's other files, write the index and last the configuration.

        Args:
            config: content of ``config.json``; None where the source has none.
            extra_files: further files by name; they replace files of the source.
            leave_out: files of the source, by relative name, that are not copied.

        Returns:
            the names of all files of the result that are no weights.
        """
        extra = dict(extra_files or {})
        written: list[str] = []
        for name, path in self.source.other_files():
            if name not in extra and name not in leave_out:
                self._write(name, path)
                written.append(name)
        for name, content in extra.items():
            self._write(name, content)
        written += extra
        if self.source.index is not None:
            self._write(self.source.index, to_bytes(self._index()))
            written.append(self.source.index)
        if config is not None:
            self._write(CONFIG, to_bytes(config))
            written.append(CONFIG)
        (self._journal / _MANIFEST).unlink()
        return written

    def _index(self) -> dict[str, Any]:
        own = [shard for shard in self.shards if "/" not in shard.file]
        placed = {spec.name: shard.file for shard in own for spec in shard.specs}
        total = sum(spec.nbytes for shard in own for spec in shard.specs)
        return {
            "metadata": {"total_size": total},
            "weight_map": {name: placed[name] for name in sorted(placed)},
        }

    def _begin(self) -> None:
        """Take the folder over: resume the job that was killed in it, or clear it."""
        manifest = self._journal / _MANIFEST
        if manifest.exists():
            same = read_model(manifest, Manifest).fingerprint == self._fingerprint
            if same and self._resume:
                self.resumed = True
                check_space(self.path, sum(shard.nbytes for shard in self.pending()))
                return
            if not same and not self._force:
                raise CheckpointError(
                    f"{self.path}: an interrupted job must be resumed with the same source and "
                    f"options, found a job with others; repeat its command, or use --force to "
                    f"begin again"
                )
        check_space(self.path, sum(shard.nbytes for shard in self.shards))
        self._clear()
        self._write(
            f"{JOURNAL}/{_MANIFEST}",
            to_bytes(Manifest(fingerprint=self._fingerprint).model_dump()),
        )

    def _clear(self) -> None:
        """Remove a former checkpoint: its configuration first, so that it never looks whole."""
        stale = [self.path / CONFIG, *sorted(self.path.glob(f"*{INDEX_SUFFIX}"))]
        stale += sorted(self.path.glob("*.safetensors"))
        stale += [self.path / shard.file for shard in self.shards]
        stale += [path for path in self._journal.iterdir() if path.name != "lock"]
        for path in stale:
            with disk_errors(path, "removable", "check the folder's permissions"):
                path.unlink(missing_ok=True)

    def _is_done(self, shard: OutputShard) -> bool:
        path = self.path / shard.file
        head, _ = encode_header(shard.specs, shard.header_strings)
        if not path.is_file() or path.stat().st_size != shard.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(head)) == head

    def _write(self, name: str, content: bytes | Path) -> None:
        """One small file: these bytes, or a copy."""
        final = self.path / name
        write_whole(self._journal / f"{final.name}.partial", final, content)


def check_apart(path: Path, source: Checkpoint) -> None:
    """An output folder that is no part of the source.

    Raises:
        CheckpointError: the folder is the source, lies in it, or holds its files.
    """
    target = path.resolve()
    home = source.folder.resolve()
    of_source = {home, *(found.parent for found in source.paths.values())}
    if target.is_relative_to(home) or target in of_source:
        raise CheckpointError(
            f"{path}: the output folder must lie outside the source, found the source's own "
            f"{home}; name another folder"
        )
    if path.exists() and not path.is_dir():
        raise CheckpointError(
            f"{path}: the output must be a folder, found a file; name another path"
        )


def check_space(path: Path, needed: int) -> None:
    """Free space for the files that are still to be written.

    Raises:
        CheckpointError: too little.
    """
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise CheckpointError(
            f"{path}: the result needs {needed + _SPARE_BYTES} bytes of free space, found {free}; "
            f"free some or name a folder on another disk"
        )


def source_fingerprint(source: Checkpoint) -> str:
    """A digest that changes when the source does: its configuration, and of each weight file the
    name, size, time of change and header."""
    digest = hashlib.sha256(to_bytes(source.config))
    for file, path in source.paths.items():
        header = source.headers[file]
        placed = [(spec, header.offsets[name]) for name, spec in header.specs.items()]
        seen = (file, header.file_bytes, path.stat().st_mtime_ns, placed)
        digest.update(repr(seen).encode())
    return digest.hexdigest()


def _content(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.name != JOURNAL)
