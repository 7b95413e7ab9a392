"""Tuned orders on disk: one JSON file for each device with its driver and library versions.

A file is named by the device and by a hash of the versions, so that environments which share a
cache do not overwrite each other, and holds the fingerprint in full: what is damaged, of another
schema, or for anything else than this machine is ignored and told. Points are added one by one,
under a lock that also keeps two processes from disturbing each other's measurements.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8dispatch.atomic import write_atomically
from fp8dispatch.kernels.tile import Tile

SCHEMA_VERSION: Literal[2] = 2
TURN_LIMIT_S = 600.0
"""How long to wait for another process that measures: a library may compile for minutes."""

_LARGEST_FILE = 32 << 20
_MAX_POINTS = 8192  # the newest are kept; a file of so many stays well below the limit
_MEMORY_SLACK = 0.1  # NVML counts what the driver keeps for itself, torch does not

_log = logging.getLogger("fp8dispatch")

_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Size = Annotated[int, Field(ge=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DeviceFingerprint(_Record):
    """What a measurement holds for.

    Attributes:
        device: kind and name of the device; two of the same name share their routes.
        capability: CUDA compute capability.
        memory_bytes: of the device, 0 where nobody could say.
        driver: version of the GPU driver, empty where it is not known.
        versions: of torch, triton, CUDA, of every backend and of what compiles its code here.
        fp8dispatch: our own version.
    """

    device: str
    capability: tuple[int, int] | None
    memory_bytes: int
    driver: str
    versions: dict[str, str]
    fp8dispatch: str

    def key(self) -> str:
        """Hash of everything but the memory, which is compared and not matched."""
        ordered = self.model_copy(
            update={"memory_bytes": 0, "versions": dict(sorted(self.versions.items()))}
        )
        return hashlib.sha256(ordered.model_dump_json().encode()).hexdigest()[:16]

    def differences(self, other: DeviceFingerprint) -> tuple[str, ...]:
        """What `other` has instead, ``"torch 2.11.0 instead of 2.12.0"``; empty where it fits."""
        told = []
        for name in ("device", "capability", "driver", "fp8dispatch"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                told.append(f"{name} {theirs} instead of {mine}")
        sizes = self.memory_bytes, other.memory_bytes
        if all(sizes) and max(sizes) - min(sizes) > _MEMORY_SLACK * max(sizes):
            told.append(f"{sizes[1]} bytes of memory instead of {sizes[0]}")
        for name in sorted({*self.versions, *other.versions}):
            mine, theirs = self.versions.get(name, "none"), other.versions.get(name, "none")
            if mine != theirs:
                told.append(f"{name} {theirs} instead of {mine}")
        return tuple(told)


class TunedPoint(_Record):
    """One size as it was measured.

    Attributes:
        recipe: as it is printed, "block 128x128".
        accuracy: the least exact class of accumulation that was allowed.
        m, n, k: the size.
        order: backends, the fastest first; empty where none computed it right.
        us: microseconds of a call, by backend.
        wrong: backend -> what was wrong with its numbers.
        tiles: backend -> the tile that its time was taken with, where that is not its own choice.
        tuned_at: seconds since 1970.
    """

    recipe: _Name
    accuracy: Literal["exact", "fast"]
    m: _Size
    n: _Size
    k: _Size
    order: tuple[_Name, ...]
    us: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    wrong: dict[str, str] = Field(default_factory=dict)
    tiles: dict[_Name, Tile] = Field(default_factory=dict)
    tuned_at: Annotated[float, Field(ge=0, le=4e9)]

    @property
    def size(self) -> tuple[str, str, int, int, int]:
        """What it is a measurement of: a newer one takes its place."""
        return self.recipe, self.accuracy, self.m, self.n, self.k

    @property
    def date(self) -> str:
        """The day it was measured, in UTC."""
        return datetime.fromtimestamp(self.tuned_at, timezone.utc).date().isoformat()


class TunedFile(_Record):
    """One file: what it holds for, and what was measured."""

    schema_version: Literal[2] = SCHEMA_VERSION
    fingerprint: DeviceFingerprint
    points: tuple[TunedPoint, ...]


def merged(old: tuple[TunedPoint, ...], new: tuple[TunedPoint, ...]) -> tuple[TunedPoint, ...]:
    """Both, the new ones in place of old ones of the same size, and the newest if too many."""
    points = {point.size: point for point in (*old, *new)}
    return tuple(sorted(points.values(), key=lambda point: point.tuned_at)[-_MAX_POINTS:])


class TunedStore:
    """The tuned orders in one directory.

    Args:
        directory: the cache directory; the files are in its folder ``tuned``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "tuned"

    def path(self, fingerprint: DeviceFingerprint) -> Path:
        """Where the orders for a device are."""
        return self.directory / f"{_stem(fingerprint)}-{fingerprint.key()}.json"

    def load(self, fingerprint: DeviceFingerprint) -> tuple[TunedFile | None, str]:
        """The file for exactly this fingerprint, and what was ignored instead, in a sentence."""
        path = self.path(fingerprint)
        found, problem = _read(path)
        if found is None:
            return None, problem or self._stale(fingerprint)
        differences = fingerprint.differences(found.fingerprint)
        if differences:
            return None, _for_others(path, differences)
        return found, ""

    def _stale(self, fingerprint: DeviceFingerprint) -> str:
        """What there is for the same device with other versions; empty where there is nothing."""
        stem = _stem(fingerprint)
        pattern = re.compile(re.escape(stem) + r"-[0-9a-f]{16}\.json")
        try:
            paths = [one for one in self.directory.iterdir() if pattern.fullmatch(one.name)]
        except OSError:
            return ""  # no such directory is the usual case
        for path in sorted(paths):
            found, _ = _read(path)
            if found is not None:
                return _for_others(path, fingerprint.differences(found.fingerprint))
        return ""

    def add(self, fingerprint: DeviceFingerprint, points: tuple[TunedPoint, ...]) -> Path:
        """Keep points beside those that are there; the caller holds the turn.

        Raises:
            OSError: the disk refuses; what was there is still there.
        """
        old, _ = self.load(fingerprint)
        kept = merged(() if old is None else old.points, points)
        content = TunedFile(fingerprint=fingerprint, points=kept).model_dump_json(indent=1)
        self._make_directory()
        path = self.path(fingerprint)
        write_atomically(path, content.encode())
        return path

    @contextmanager
    def turn(self, fingerprint: DeviceFingerprint, wait_s: float = TURN_LIMIT_S) -> Iterator[str]:
        """Hold the right to measure and to write, which one process has; a dead one's is freed.

        Yields:
            Empty where it is held; else why not, and nothing may be written.
        """
        lock = FileLock(self.path(fingerprint).with_suffix(".lock"))
        reason = ""
        try:
            self._make_directory()
            lock.acquire(timeout=wait_s)
        except Timeout:
            reason = f"another process holds {lock.lock_file} for more than {wait_s:g} s"
        except (OSError, NotImplementedError) as error:
            reason = f"{self.directory} cannot be used ({type(error).__name__}: {error})"
        try:
            yield reason
        finally:
            with suppress(OSError):  # the file's disk may be gone: the lock went with it
                lock.release(force=True)

    def count(self) -> int:
        """How many files there are.

        Raises:
            OSError: the directory cannot be read.
        """
        return len(list(self.directory.glob("*.json")))

    def clear(self) -> int:
        """Delete every file; the number of those deleted.

        Raises:
            OSError: a file that cannot be deleted: the user asked for it and must know.
        """
        files = list(self.directory.glob("*.json"))
        for path in (*files, *self.directory.glob("*.tmp")):
            path.unlink(missing_ok=True)
        return len(files)

    def _make_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def now() -> float:
    """Seconds since 1970."""
    return time.time()


def _stem(fingerprint: DeviceFingerprint) -> str:
    return re.sub(r"[^a-z0-9]+", "-", fingerprint.device.lower()).strip("-")[:80]


def _read(path: Path) -> tuple[TunedFile | None, str]:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
        return TunedFile.model_validate_json(content), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        return None, f"the tuned routes in {path} are ignored, they cannot be read: {reason}"


def _for_others(path: Path, differences: tuple[str, ...]) -> str:
    return (
        f"the tuned routes in {path} are ignored, they are for {'; '.join(differences[:4])}: run "
        f"fp8dispatch tune again"
    )
