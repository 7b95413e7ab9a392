"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file aside, flush it to the disk and move it into place.

    Whoever reads at the same time, or after a crash, sees the old file or the new one.

    Raises:
        OSError: the disk refuses; nothing is left behind.
    """
    aside = path.with_name(f"{path.stem}{secrets.token_hex(8)}.tmp")
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
