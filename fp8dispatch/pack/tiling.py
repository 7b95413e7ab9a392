"""How a weight is cut for packing: bands of rows, and tiles that stay in the processor's cache.

A tile is a few rows (one row of blocks, where blocks have several rows) by at most `TILE_ELEMENTS`
elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fp8dispatch.pack.scheme import Scheme
from fp8dispatch.quantization.weight import block_of
from fp8dispatch.recipe import Granularity, ceil_div

TILE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Tiling:
    """How a matrix [N, K] is cut, and how its scales lie.

    Attributes:
        n, k: the matrix.
        rows, columns: what shares one scale, never more than n and k.
        band: rows that are read, quantised and written together.
    """

    n: int
    k: int
    rows: int
    columns: int
    band: int

    @classmethod
    def of(cls, scheme: Scheme, shape: tuple[int, int]) -> Tiling:
        """The tiling of a weight under a scheme."""
        n, k = shape
        rows, columns = block_of(scheme.recipe, n, k)
        # A band is one row of blocks; rows that share no scale, or share one with all others, go
        # together as far as a tile reaches.
        blocks = scheme.recipe.granularity is Granularity.BLOCK and rows > 1
        band = rows if blocks else max(1, min(n, TILE_ELEMENTS // k))
        return cls(n, k, rows, columns, band)

    @property
    def scales_per_row(self) -> int:
        """Scales along K."""
        return ceil_div(self.k, self.columns)

    def bands(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Row ranges of the bands between two rows; `start` is the first row of a band."""
        end = self.n if stop is None else stop
        for top in range(start, end, self.band):
            yield top, min(top + self.band, end)

    def column_ranges(self, rows: int) -> Iterator[tuple[int, int]]:
        """Column ranges of a band's tiles: whole blocks, a ragged block on its own."""
        whole = self.k - self.k % self.columns
        width = max(1, TILE_ELEMENTS // max(1, rows * self.columns)) * self.columns
        for left in range(0, whole, width):
            yield left, min(left + width, whole)
        if whole < self.k:
            yield whole, self.k
