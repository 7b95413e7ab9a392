"""The namespace ``torch.ops.fp8dispatch``, and how an operator is put into it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.library import Library, register_fake, register_vmap

from fp8dispatch.checks import VMAP_REFUSED
from fp8dispatch.errors import UnsupportedTransformError

LIBRARY = Library("fp8dispatch", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str) -> None:
    """Declare an operator."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    raise UnsupportedTransformError(VMAP_REFUSED)


def register(name: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give a declared operator its computation, its fake and its answer to vmap."""
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    register_fake(f"fp8dispatch::{name}", fake, lib=LIBRARY)
    register_vmap(f"fp8dispatch::{name}", _refuse_vmap, lib=LIBRARY)


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """An exported graph may run under autocast, which would change sums that are stated as fp32."""
    device_type = tensor.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
