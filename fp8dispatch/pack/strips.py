"""Quantising a matrix tile by tile on the CPU: the bytes of `fp8dispatch.quantize`, without it all.

The float form of a tile stays in the processor's cache. The arithmetic is that of
`quantization.eager`: IEEE division by the scale that is stored, a clamp, a cast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8dispatch.errors import NumericalOverflowError
from fp8dispatch.formats import decode_scale, max_value, round_scale
from fp8dispatch.pack.scale_search import ScaleSearch
from fp8dispatch.pack.scheme import AMAX, MSE, Scheme
from fp8dispatch.pack.tiling import Tiling
from fp8dispatch.quantization.eager import scale_of
from fp8dispatch.recipe import ceil_div


def amax_of(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of a matrix, fp32, shape [1]; NaN wins."""
    low, high = values.amin(), values.amax()  # on the narrow dtype: nothing is converted
    return torch.maximum(high.float(), -low.float()).reshape(1)


@dataclass(frozen=True)
class QuantizedBand:
    """A band of a weight in FP8.

    Attributes:
        data: [rows, K] FP8.
        multipliers: fp32 scales, value = data * scale: [1, blocks] or [rows, blocks]; [1, 1] of
            the whole tensor.
        amax: what the largest magnitudes were, of the same shape.
        values: [rows, K] fp32, what was quantised; None where it was not to be kept.
        scratch: memory of the same form that nobody needs any more, with them.
    """

    data: torch.Tensor
    multipliers: torch.Tensor
    amax: torch.Tensor
    values: torch.Tensor | None = None
    scratch: torch.Tensor | None = None


class BandQuantizer:
    """Quantises the bands of one weight, one at a time, in memory that is used again.

    Args:
        tiling: of the whole weight.
        scheme: how to quantise.
        where: the file and the tensor, for errors.
        scales: one of `SCALES`; a search needs fp32 scales and more than one of them.
        keep: whether bands carry their values, for a `BandMeter`.
    """

    def __init__(
        self,
        tiling: Tiling,
        scheme: Scheme,
        where: str = "the tensor",
        scales: str = AMAX,
        keep: bool = False,
    ) -> None:
        self.tiling, self.scheme, self.where = tiling, scheme, where
        self._dtype: torch.dtype = getattr(torch, scheme.dtype)
        self._search = ScaleSearch(tiling, self._dtype) if scales == MSE else None
        self._wide = torch.empty((tiling.band, tiling.k), dtype=torch.float32)
        self._quotient = torch.empty_like(self._wide) if keep else self._wide  # divided in place
        self._keep = keep
        self._data = torch.empty((tiling.band, tiling.k), dtype=self._dtype)

    def quantize(
        self, values: torch.Tensor, tensor_amax: torch.Tensor | None = None
    ) -> QuantizedBand:
        """Quantise one band; its data and values are overwritten by the next call.

        Args:
            values: [rows, K] bf16, fp16 or fp32: a band of the tiling.
            tensor_amax: [1] fp32, the largest magnitude of the whole tensor: with tensor scales.

        Raises:
            NumericalOverflowError: NaN or infinity in the values, or a scale that its dtype does
                not hold.
        """
        rows, columns = values.shape[0], self.tiling.columns
        wide, data = self._wide[:rows].copy_(values), self._data[:rows]
        ranges = list(self.tiling.column_ranges(rows))
        if tensor_amax is None:
            parts = [_block_amax(wide[:, a:b], columns, self.tiling.rows == 1) for a, b in ranges]
            amax = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        else:
            amax = tensor_amax.reshape(1, 1)
        multipliers = multipliers_of(amax, self.scheme, self.where)
        if self._search is not None:
            multipliers = self._search.choose(wide, multipliers)
        limit = max_value(self._dtype)
        for left, right in ranges:
            tile, quotient = wide[:, left:right], self._quotient[:rows, left:right]
            if tensor_amax is None:
                first, count = left // columns, ceil_div(right - left, columns)
                scale = multipliers[:, first : first + count, None]
                blocks = quotient.view(rows, count, -1)
                torch.div(tile.view(rows, count, -1), scale, out=blocks)
            else:
                torch.div(tile, multipliers, out=quotient)
            # As `eager.cast`, in place: clamped first, since an overflowing cast differs by version
            data[:, left:right].copy_(quotient.clamp_(-limit, limit))
        if not self._keep:
            return QuantizedBand(data, multipliers, amax)
        return QuantizedBand(data, multipliers, amax, wide, self._quotient[:rows])


def _block_amax(tile: torch.Tensor, columns: int, per_row: bool) -> torch.Tensor:
    """Largest magnitudes of a tile's blocks: [1, blocks] of all rows, or [rows, blocks]."""
    if per_row:
        blocks = tile.view(tile.shape[0], -1, min(columns, tile.shape[1]))
        return torch.maximum(blocks.amax(2), -blocks.amin(2))
    of_columns = torch.maximum(tile.amax(0), -tile.amin(0))
    return of_columns.view(-1, min(columns, tile.shape[1])).amax(1)[None]


def multipliers_of(amax: torch.Tensor, scheme: Scheme, where: str) -> torch.Tensor:
    """The scales to divide by, which are those that are stored, of the same shape as `amax`.

    Raises:
        NumericalOverflowError: maxima that are not finite, or scales that the dtype does not hold.
    """
    if not bool(torch.isfinite(amax).all()):
        raise NumericalOverflowError(
            f"{where} must hold finite values to be quantised, found NaN or infinity; repair the "
            f"weight, or leave it as it is with --skip"
        )
    scale = scale_of(amax, getattr(torch, scheme.dtype))
    if scheme.scale_dtype == "float32":
        return scale
    multipliers = decode_scale(round_scale(scale, getattr(torch, scheme.scale_dtype)))
    if not bool(torch.isfinite(multipliers).all()):
        raise NumericalOverflowError(
            f"{where} needs scales within {scheme.scale_dtype}, found a largest value of "
            f"{float(amax.max()):.3g}; use a recipe with float32 scales"
        )
    return multipliers
