"""MSLK's block GEMM whose activations have one scale for each 128x128 tile; see `fbgemm_tile`."""

from __future__ import annotations

from fp8dispatch.backends.fbgemm_tile import TileScales
from fp8dispatch.backends.mslk import Mslk


class MslkTile(TileScales, Mslk):
    """Tile-wise CUTLASS kernel of MSLK."""

    name = "mslk_tile"


BACKEND = MslkTile()
