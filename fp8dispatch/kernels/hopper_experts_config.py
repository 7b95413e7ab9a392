"""Sizes of `hopper_experts`, as plain data; imports nothing."""

TILE_ROWS, TILE_COLUMNS = 128, 256
STAGES = 4
"""Blocks of 128 of K in flight."""

GROUP_M = 16
"""Tile rows of an expert that are walked together before moving along N."""

LONGEST_ROW = 32_768
"""Columns of a row that one program still holds, to find one scale for all of it."""
