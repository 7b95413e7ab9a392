"""What torch.compile reads of the policy while it records a call; see `graph_policy`.

Imported by the first call that is recorded: it imports the compiler, which eager calls never need.
"""

from __future__ import annotations

import torch

from fp8dispatch import policy, registry
from fp8dispatch.graph_policy import encode


def dgrad_of(x: torch.Tensor, backend: str | None) -> str:
    """What a call over activations x carries; empty where no gradient of x is recorded."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return ""
    text: str = _text_of(backend, policy.dgrad_stated)
    return text


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # as torch has it
def _text_of(backend: str | None, stated: str) -> str:
    """The text of the policy here and now; `stated` is for the compiler's guards."""
    return encode(policy.resolve(backend, registry.NAMES))
