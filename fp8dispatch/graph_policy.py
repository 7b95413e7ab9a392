"""The policy that a compiled graph carries into its backward pass.

An operator of a graph reads the policy when it runs, in the thread that runs it. Backward runs on
a thread of its own, where `use_backend` of the forward pass says nothing. So a call that records a
gradient carries a text: how dX is computed and, where it is an FP8 GEMM, the whole policy, since
that chooses its backend. torch.compile makes a new graph when what is stated about dgrad changes.
Where its guards cannot see that (statements in several threads or tasks at once) the operator
raises: it never runs a graph of another policy.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from fp8dispatch.errors import ConfigurationError
from fp8dispatch.policy import Policy
from fp8dispatch.problem import Accuracy, Dgrad


def encode(allowed: Policy) -> str:
    """A policy as a text; only "dequantized" where dX needs to know no more."""
    if allowed.dgrad is Dgrad.DEQUANTIZED:
        return Dgrad.DEQUANTIZED.value
    said = asdict(allowed) | {"accuracy": allowed.accuracy.value}
    del said["dgrad"], said["tile"]  # tiles are stated by tuning alone, which records no gradient
    return json.dumps(said, separators=(",", ":"))


def decode(text: str) -> Policy | None:
    """The policy of an FP8 dgrad; None where dX goes through the dequantised weight."""
    if text in ("", Dgrad.DEQUANTIZED.value):
        return None
    said = json.loads(text)
    said |= {name: tuple(said[name]) for name in ("only", "excluded")}
    said |= {"accuracy": Accuracy(said["accuracy"]), "dgrad": Dgrad.FP8}
    return Policy(**said)


def check(text: str, allowed: Policy) -> None:
    """That a graph which carries `text` may run under the policy `allowed`.

    Raises:
        ConfigurationError: dX would be computed in another way than is stated now.
    """
    if text and text != encode(allowed):
        raise ConfigurationError(
            f"this graph was compiled for the policy {text} of its backward pass, and "
            f"{encode(allowed)} is stated now; run it under the statement that it was compiled "
            f"under, state dgrad for all threads with set_backend, or compile it again "
            f"(torch.compiler.reset())"
        )
