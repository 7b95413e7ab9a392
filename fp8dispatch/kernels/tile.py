"""A tile of a GEMM as plain data: what may be chosen freely, since it changes no bit of the result.

Imports nothing, so that the router and stored measurements can speak of tiles without Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = (16, 32, 64, 128)
COLUMNS = (32, 64, 128, 256)
WARPS = (4, 8)
MOST_STAGES = 8  # more never fit beside a second program
PROGRAMS = (0, 1, 2)
GROUPS = (1, 4, 8, 16, 32)
USUAL_GROUP = 16
"""264 tiles of 64 x 128 run at once on 132 SMs: 16 x 16.5 of them read the fewest bytes."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a GEMM's output is cut up and walked; how it is summed is not told here.

    Attributes:
        block_m: rows of an output tile.
        block_n: columns of an output tile.
        num_warps: warps of a program.
        num_stages: operand tiles in flight.
        programs_per_sm: persistent programs on each SM, or 0 for one program per tile.
        group_m: tile rows that are walked together before moving along N.

    Raises:
        ValueError: a number that no kernel is made for.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 0
    group_m: int = USUAL_GROUP

    def __post_init__(self) -> None:
        for name, allowed in (
            ("block_m", ROWS),
            ("block_n", COLUMNS),
            ("num_warps", WARPS),
            ("num_stages", range(1, MOST_STAGES + 1)),
            ("programs_per_sm", PROGRAMS),
            ("group_m", GROUPS),
        ):
            found = getattr(self, name)
            if found not in allowed:
                known = ", ".join(map(str, allowed))
                raise ValueError(f"{name} of a tile must be one of {known}, found {found!r}")

    def __str__(self) -> str:
        programs = f", {self.programs_per_sm} per SM" if self.programs_per_sm else ""
        group = f", groups of {self.group_m}" if self.group_m != USUAL_GROUP else ""
        return (
            f"{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages"
            f"{programs}{group}"
        )
