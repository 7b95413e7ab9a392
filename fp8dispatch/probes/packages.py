"""Which of the libraries that matter are installed, read from package metadata alone."""

from __future__ import annotations

import functools
from importlib import metadata

DISTRIBUTIONS = ("torch", "triton", "pytorch-triton", "triton-windows")
"""Distributions whose version a backend asks for. The last two carry the module triton as well."""


@functools.cache
def installed_versions() -> dict[str, str]:
    """Distribution name -> version text, for those of `DISTRIBUTIONS` that are installed."""
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for carrier in ("pytorch-triton", "triton-windows"):
        if carrier in found:
            found.setdefault("triton", found[carrier])
    return found
