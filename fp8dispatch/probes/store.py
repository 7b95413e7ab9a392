"""Verdicts of canaries on disk, so that a backend is tested once per machine and not per process.

One JSON file for each fingerprint (backend, recipe, device, driver, versions), named by its hash.
Files are written aside and moved into place, so a reader sees the old or the new one, whole. What
is damaged or of another schema is ignored and written anew. Where the directory cannot be written,
nothing is kept, which is said once in the log.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from fp8dispatch.atomic import write_atomically

SCHEMA_VERSION: Literal[1] = 1
WRONG_LASTS_S = 7 * 24 * 3600.0
"""A wrong verdict is tested again after a week: drivers are repaired without a new version."""

_CLOCK_SKEW_S = 3600.0  # hosts that share a home directory may disagree about the time
_LARGEST_FILE = 1 << 16

_log = logging.getLogger("fp8dispatch")


class Fingerprint(BaseModel):
    """What a verdict holds for; a change of anything here asks for a new one.

    Attributes:
        backend: its registered name.
        recipe: the recipe, as text.
        device: kind and name of the device; two of the same name share a verdict.
        capability: CUDA compute capability.
        driver: version of the GPU driver, empty where it is not known.
        versions: versions of torch, triton, CUDA and of whatever carries or compiles the backend's
            code.
        fp8dispatch: our own version: a canary that looks harder judges anew.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    recipe: str
    device: str
    capability: tuple[int, int] | None
    driver: str
    versions: dict[str, str]
    fp8dispatch: str

    def key(self) -> str:
        """Name of its file, without the suffix."""
        ordered = self.model_copy(update={"versions": dict(sorted(self.versions.items()))})
        return hashlib.sha256(ordered.model_dump_json().encode()).hexdigest()[:32]


class StoredVerdict(BaseModel):
    """One file: a verdict, what it holds for, and when it was found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: Fingerprint
    state: Literal["right", "wrong"]
    reason: str
    found_at: float


class VerdictStore:
    """The verdicts in one directory.

    No method raises because of the disk: a verdict that cannot be read is not there, and one that
    cannot be written is not kept.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory / "verdicts"
        self._clock = clock
        self._complained = False

    def get(self, fingerprint: Fingerprint) -> StoredVerdict | None:
        """The verdict for exactly this fingerprint, unless it is a wrong one that has expired."""
        path = self._path(fingerprint)
        try:
            with path.open("rb") as file:
                content = file.read(_LARGEST_FILE + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain(error)
            return None
        try:
            if len(content) > _LARGEST_FILE:
                raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
            verdict = StoredVerdict.model_validate_json(content)
        except (ValidationError, ValueError) as error:
            reason = str(error).splitlines()[0]
            _log.info("the stored verdict %s is ignored, it cannot be read: %s", path, reason)
            return None
        if verdict.fingerprint != fingerprint:
            return None
        age = self._clock() - verdict.found_at
        if verdict.state == "wrong" and not -_CLOCK_SKEW_S <= age < WRONG_LASTS_S:
            return None
        return verdict

    def put(self, fingerprint: Fingerprint, state: Literal["right", "wrong"], reason: str) -> None:
        """Keep a verdict; whoever reads at the same time sees the old file or the new one."""
        verdict = StoredVerdict(
            fingerprint=fingerprint, state=state, reason=reason, found_at=self._clock()
        )
        path = self._path(fingerprint)
        try:
            self._make_directory()
            write_atomically(path, verdict.model_dump_json(indent=2).encode())
        except OSError as error:
            self._complain(error)

    @contextmanager
    def probing(self, fingerprint: Fingerprint, wait_s: float) -> Iterator[bool]:
        """Hold the right to probe, which one process per host has; the system frees a dead one's.

        Args:
            fingerprint: what is to be probed.
            wait_s: how long to wait for another process; what it found is then in `get`.

        Yields:
            False where the other process was not done in time; True also where there can be no
            lock, since everybody must then find out alone.
        """
        host = "".join(letter for letter in platform.node() if letter.isalnum() or letter in "-_")
        lock = FileLock(self.directory / f"{fingerprint.key()}.{host}.lock")
        held = True
        try:
            self._make_directory()
            lock.acquire(timeout=wait_s)
        except Timeout:
            held = False
        except (OSError, NotImplementedError) as error:
            self._complain(error)
        try:
            yield held
        finally:
            with suppress(OSError):  # the file's disk may be gone: the lock went with it
                lock.release(force=True)

    def clear(self) -> int:
        """Delete every verdict; the number of those deleted.

        Raises:
            OSError: a file that cannot be deleted: the user asked for it and must know.
        """
        verdicts = list(self.directory.glob("*.json"))
        for path in (*verdicts, *self.directory.glob("*.tmp")):
            path.unlink(missing_ok=True)
        return len(verdicts)

    def _path(self, fingerprint: Fingerprint) -> Path:
        return self.directory / f"{fingerprint.key()}.json"

    def _make_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            _log.warning(
                "verdicts on backends are kept for this process only, since %s cannot be used "
                "(%s: %s); set FP8DISPATCH_CACHE_DIR to a directory that can be written",
                self.directory,
                type(error).__name__,
                error,
            )
