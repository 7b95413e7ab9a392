"""What libraries have registered with torch: a schema alone computes nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch


def has_operator(namespace: str, name: str) -> bool:
    """Something is registered as ``torch.ops.<namespace>.<name>``."""
    return bool(torch._C._dispatch_has_kernel(f"{namespace}::{name}"))


def cuda_operator(namespace: str, name: str) -> Callable[..., torch.Tensor] | None:
    """The operator, where it has a CUDA kernel and not only a schema."""
    full = f"{namespace}::{name}"  # `torch.ops` would be content with a schema
    if not has_operator(namespace, name) or not (
        torch._C._dispatch_has_kernel_for_dispatch_key(full, "CUDA")
    ):
        return None
    found: Callable[..., torch.Tensor] = getattr(getattr(torch.ops, namespace), name).default
    return found
