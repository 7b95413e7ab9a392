"""How results become the words of the README: what reads a file, and numbers as one rounds them."""

from __future__ import annotations

from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

Read = Callable[[str], Any]
"""Gives the content of a result file: parsed where it is JSON, else its text."""

WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 8: "eight"}


def rounded(value: float, digits: int = 0) -> str:
    """A number as one rounds by hand, halves up: 2.05 is 2.1."""
    step = Decimal(1).scaleb(-digits)
    return str(Decimal(str(value)).quantize(step, ROUND_HALF_UP))
