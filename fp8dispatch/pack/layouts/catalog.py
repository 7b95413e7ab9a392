"""The list of on-disk formats."""

from __future__ import annotations

from fp8dispatch.errors import InvalidInputError
from fp8dispatch.pack.layouts.compressed import CompressedTensors
from fp8dispatch.pack.layouts.contract import Layout
from fp8dispatch.pack.layouts.fbgemm import Fbgemm
from fp8dispatch.pack.layouts.hf import FineGrained
from fp8dispatch.pack.layouts.modelopt import ModelOpt
from fp8dispatch.pack.layouts.native import Native

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (CompressedTensors(), FineGrained(), ModelOpt(), Fbgemm(), Native())
}
"""Format name -> format; the first one is the default."""

ALIASES = {"ct": "compressed-tensors"}


def get_layout(name: str) -> Layout:
    """A format from its name or alias.

    Raises:
        InvalidInputError: no format has this name.
    """
    found = LAYOUTS.get(ALIASES.get(name, name))
    if found is None:
        raise InvalidInputError(f"format must be one of {', '.join(LAYOUTS)}, found {name!r}")
    return found
