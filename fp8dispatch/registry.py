"""The backends by name, in the default order; each is loaded when it is first asked for."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8dispatch.backends.contract import Backend

# One line per backend: its name and the module whose BACKEND it is. The order is the order in
# which backends are tried: the vendor's GEMM where it runs, our kernels next, eager always last.
_MODULES: dict[str, str] = {
    "cublaslt": "fp8dispatch.backends.cublaslt",
    "triton": "fp8dispatch.backends.triton",
    "eager": "fp8dispatch.backends.eager",
}

NAMES: tuple[str, ...] = tuple(_MODULES)


def default_order(device_type: str) -> tuple[str, ...]:
    """Every backend, in the order in which it is tried on a kind of device.

    Off the GPU plain torch comes first: the others run there in an interpreter at best.
    """
    if device_type == "cuda":
        return NAMES
    return ("eager", *(name for name in NAMES if name != "eager"))


@functools.cache
def load(name: str) -> Backend:
    """The backend called `name`, which must be one of `NAMES`."""
    backend: Backend = import_module(_MODULES[name]).BACKEND
    return backend
