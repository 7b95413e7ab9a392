"""The arithmetic of quantisation in plain torch: any device, and the definition of the numbers.

Scales are ``amax / max_value(dtype)``, with the amax floored at 1e-12, and 1 where the amax is 0.
Values are divided by their scale in IEEE fp32, then `fp8dispatch.formats.cast` clamps and rounds
them.
"""

from __future__ import annotations

import torch

from fp8dispatch.formats import AMAX_FLOOR, cast, max_value
from fp8dispatch.recipe import ceil_div


def scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 multipliers for fp32 maxima of any shape; NaN and infinity pass through."""
    # Divided by a tensor: on CUDA torch turns the division by a number into a product with its
    # reciprocal, which is not the IEEE quotient.
    scale = amax.clamp(min=AMAX_FLOOR) / torch.full_like(amax, max_value(dtype))
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize_grid(
    x: torch.Tensor, rows: int, columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix [R, C] with one scale per `rows` x `columns` block, edges ragged.

    Returns:
        data [R, C] in `dtype`, and scale [ceil(R / rows), ceil(C / columns)] in fp32.
    """
    scale = scale_of(grid_amax(x, rows, columns), dtype)
    return cast(x.float() / expand_grid(scale, rows, columns, x.shape), dtype), scale


def quantize_tiles(
    x: torch.Tensor, rows: int, columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_grid` of activations [M, K], where a row that is not finite spoils no other one.

    Such a row counts for no scale and becomes NaN throughout; the others are quantised as if it
    were zero.
    """
    rows = min(rows, max(x.shape[0], 1))  # the same grid, without padding a few rows to a tile
    finite = torch.isfinite(x).all(dim=1, keepdim=True)
    counted = torch.where(finite, x.float(), 0.0)
    scale = scale_of(grid_amax(counted, rows, columns), dtype)
    quotient = counted / expand_grid(scale, rows, columns, x.shape)
    return cast(torch.where(finite, quotient, torch.nan), dtype), scale


def grid_amax(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Largest magnitude of each `rows` x `columns` block of [R, C], fp32; NaN wins."""
    r, c = x.shape
    grid_r, grid_c = ceil_div(r, rows), ceil_div(c, columns)
    padding = (0, grid_c * columns - c, 0, grid_r * rows - r)
    padded = torch.nn.functional.pad(x.detach().float().abs(), padding)
    return padded.reshape(grid_r, rows, grid_c, columns).amax(dim=(1, 3))


def expand_grid(
    scale: torch.Tensor, rows: int, columns: int, shape: torch.Size | tuple[int, int]
) -> torch.Tensor:
    """A grid of block scales spread over [R, C], each value over its `rows` x `columns` block."""
    r, c = shape
    spread = scale
    if rows > 1:
        spread = spread.repeat_interleave(rows, dim=0)
    if columns > 1:
        spread = spread.repeat_interleave(columns, dim=1)
    return spread[:r, :c]


def quantize_static(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[M, K] divided by one given fp32 scale; finite values saturate, the others become NaN."""
    wide = x.float()
    quotient = torch.where(torch.isfinite(wide), wide / scale, torch.nan)
    return cast(quotient, dtype)
