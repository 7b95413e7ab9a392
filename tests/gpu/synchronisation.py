"""A call that waits for the device raises."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def forbidden() -> Iterator[None]:
    """Inside, every operation of torch that synchronises raises a RuntimeError."""
    with warnings.catch_warnings():
        # Torch says at the first use that the mode is a prototype.
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
