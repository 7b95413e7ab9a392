"""Sizes of `hopper_experts`, as plain data; imports nothing."""

TILE_ROWS, TILE_COLUMNS = 128, 256
STAGES = 4
"""Blocks of 128 of K in flight."""

GROUP_M = 16
"""Tile rows of an expert that are walked together before moving along N."""

LONGEST_ROW = 32_768
"""Columns of a row that one program still holds, to find one scale for all of it."""

PITCH = 4
"""Columns, 16 bytes, at whose multiples an expert's activation scales begin."""


def scale_columns(rows: int, experts: int) -> int:
    """Columns of the activation scales of sorted rows: each expert's end may be padded."""
    return -(-(rows + (PITCH - 1) * experts) // PITCH) * PITCH


def first_scale(start: int, expert: int) -> int:
    """Column of the scale of an expert's first row, which is row `start` of all.

    It depends on nothing but these two, so whoever knows an expert's start knows it. Since
    ``start + 3 * expert`` grows by an expert's rows and 3, no expert reaches into the next one's.
    """
    return (start + (PITCH - 1) * (expert + 1)) // PITCH * PITCH
