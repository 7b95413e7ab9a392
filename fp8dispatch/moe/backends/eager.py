"""Plain torch on any device: one expert after the other, on the rows that it has.

It waits to learn how many rows each expert has, so it cannot be captured in a graph.
"""

from __future__ import annotations

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.moe.backends.contract import ExpertBackend
from fp8dispatch.problem import FLOAT8_NAMES


class Eager(ExpertBackend):
    """The linear of the same name for each expert."""

    name = "eager"
    any_strides = True
    weight_dtypes = frozenset(FLOAT8_NAMES)
    experts = computed_in("fp8dispatch.moe.backends.compute.eager")


BACKEND = Eager()
