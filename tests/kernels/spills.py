"""How many bytes of stack a compiled kernel of ours may have."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def allowed_stack(name: str) -> int:
    """None, but for two words off Hopper with a Triton other than the one in constraints.txt.

    Args:
        name: ``"<target>.<variant>"``.
    """
    pinned = re.search(r"^triton==(\d+\.\d+)\.", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pinned is not None
    is_pinned = version("triton").startswith(f"{pinned[1]}.")
    return 0 if is_pinned or name.startswith("90.") else 8
