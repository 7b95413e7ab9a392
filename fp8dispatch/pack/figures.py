"""How much a weight lost: sums over its bands that merge into the figures of one tensor.

SQNR in dB is ``10 log10(sum x^2 / sum (x - data * scale)^2)``. Sums are fp32 within a band, whose
values are brought near 1 by a power of two first, and double across bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict

from fp8dispatch.formats import max_value
from fp8dispatch.pack.decoding import decode_into
from fp8dispatch.pack.scheme import Scheme
from fp8dispatch.pack.strips import QuantizedBand
from fp8dispatch.pack.tiling import Tiling
from fp8dispatch.recipe import ceil_div

SUSPICIOUS_SQNR = 28.0
"""E4M3 gives about 31.5 dB at every granularity; a weight below this was spoilt by something."""
SAMPLE = 1 << 17
"""Values of a tensor that its percentile is taken from, evenly spaced."""
_CLIP_TOLERANCE = 1 + 1e-6  # the quotient of an amax and its rounded scale
_SAFE_EXPONENT = 40  # of an amax: sums of squares, and squares of errors, stay within fp32
_PIECE, _SHORTEST_PIECE = 1024, 256  # values between which codes of 0 are looked for together


class TensorFigures(BaseModel):
    """What quantising one weight did to it.

    Attributes:
        name: full name of the weight.
        shape: (N, K).
        scheme: how it was quantised, in words.
        amax: largest magnitude.
        p999: magnitude that 99.9 % of the values do not exceed, of an evenly spaced sample.
        saturation_ratio: amax / p999; None where p999 is 0.
        scale_min, scale_max: range of the scales.
        zero_blocks: scales that are 1 because everything under them is 0.
        clipped: values beyond the format's largest, which were clamped.
        flushed: share of the values that became 0 and were not.
        sqnr_db: signal to quantisation noise; None where nothing was lost.
        max_abs_error: largest |x - data * scale|.
        signal: sum of the squares of the values.
        relative_error: Frobenius norm of the error over that of the weight.
        cosine: of the weight and its restored values; None for a weight of zeros.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: tuple[int, int]
    scheme: str
    amax: float
    p999: float
    saturation_ratio: float | None
    scale_min: float
    scale_max: float
    zero_blocks: int
    clipped: int
    flushed: float
    sqnr_db: float | None
    max_abs_error: float
    signal: float
    relative_error: float
    cosine: float | None


@dataclass
class Sums:
    """Sums over some bands of a weight; those of other bands are added with `merge`."""

    values: int = 0
    signal: float = 0.0
    restored: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    max_abs_error: float = 0.0
    amax: float = 0.0
    scale_min: float = math.inf
    scale_max: float = 0.0
    zero_blocks: int = 0
    clipped: int = 0
    flushed: int = 0
    sample: list[torch.Tensor] = field(default_factory=list)

    def merge(self, other: Sums) -> None:
        """Add the sums of other bands."""
        for name in ("values", "signal", "restored", "product", "noise", "zero_blocks"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.clipped += other.clipped
        self.flushed += other.flushed
        self.max_abs_error = max(self.max_abs_error, other.max_abs_error)
        self.amax = max(self.amax, other.amax)
        self.scale_min = min(self.scale_min, other.scale_min)
        self.scale_max = max(self.scale_max, other.scale_max)
        self.sample += other.sample

    def figures(self, name: str, shape: tuple[int, int], scheme: str) -> TensorFigures:
        """The figures of the whole weight, once every band was added."""
        sample = torch.cat(self.sample)
        p999 = float(sample.kthvalue(max(1, math.ceil(0.999 * sample.numel()))).values)
        lost = self.noise / self.signal if self.signal else 0.0
        size = math.sqrt(self.signal) * math.sqrt(self.restored)
        return TensorFigures(
            name=name,
            shape=shape,
            scheme=scheme,
            amax=self.amax,
            p999=p999,
            saturation_ratio=self.amax / p999 if p999 else None,
            scale_min=self.scale_min,
            scale_max=self.scale_max,
            zero_blocks=self.zero_blocks,
            clipped=self.clipped,
            flushed=self.flushed / max(1, self.values),
            sqnr_db=-10 * math.log10(lost) if lost else None,
            max_abs_error=self.max_abs_error,
            signal=self.signal,
            relative_error=math.sqrt(lost),
            cosine=self.product / size if size else None,
        )


class BandMeter:
    """Measures the quantised bands of one weight, in memory that is used again.

    The error is formed in one pass over the decoded codes, and every sum is a dot product or a
    minimum: those run at the speed of memory, where counting and comparing are several times
    slower.

    Args:
        tiling: of the whole weight.
        scheme: of the weight, in E4M3 or its FNUZ form.
    """

    def __init__(self, tiling: Tiling, scheme: Scheme) -> None:
        self._tiling, self._limit = tiling, max_value(getattr(torch, scheme.dtype))
        self._clips = scheme.scale_dtype in ("bfloat16", "float16")
        shape = (tiling.band, tiling.k)
        self._half = torch.empty(shape, dtype=torch.int16)
        self._magnitudes = torch.empty(shape, dtype=torch.int8)
        self._every = max(1, tiling.n * tiling.k // SAMPLE)
        pieces = math.gcd(tiling.k, _PIECE)
        self._piece = pieces if pieces >= _SHORTEST_PIECE else tiling.k

    def measure(self, band: QuantizedBand, first_row: int) -> Sums:
        """Compare a band with what it was made of.

        Args:
            band: of a `BandQuantizer` that keeps the values, which may be overwritten here.
            first_row: of the band in the weight; it decides which values are sampled.
        """
        wide = band.values
        assert wide is not None  # the quantiser was told to keep them
        least, peak = (float(one) for one in torch.aminmax(band.amax))
        scale_min, scale_max = (float(one) for one in torch.aminmax(band.multipliers))
        sums = Sums(
            values=wide.numel(),
            amax=peak,
            scale_min=scale_min,
            scale_max=scale_max,
            zero_blocks=self._zero_blocks(band, first_row) if least == 0 else 0,
            clipped=self._clipped(wide, band) if self._clips else 0,
            flushed=self._flushed(wide, band),
            sample=[self._sample(wide, first_row)],
        )
        # A power of two brings the squares within fp32 and changes no digit.
        exponent = math.frexp(peak)[1]
        power = 0 if abs(exponent) <= _SAFE_EXPONENT else min(126, max(-126, -exponent))
        if power:
            wide.mul_(2.0**power)
        up = 2.0**-power
        truth, error = wide.view(-1), self._subtract_restored(wide, band, power).view(-1)
        signal, noise = float(truth.dot(truth)), float(error.dot(error))
        if noise > 0.1 * signal:  # a spoilt weight: the differences below would cancel
            restored = truth - error
            sums.restored, sums.product = float(restored.dot(restored)), float(restored.dot(truth))
        else:
            common = float(truth.dot(error))
            sums.restored, sums.product = signal - 2 * common + noise, signal - common
        sums.signal, sums.noise = signal * up * up, noise * up * up
        sums.restored, sums.product = sums.restored * up * up, sums.product * up * up
        sums.max_abs_error = max(float(error.amax()), -float(error.amin())) * up
        return sums

    def _subtract_restored(
        self, wide: torch.Tensor, band: QuantizedBand, power: int
    ) -> torch.Tensor:
        """``values - data * scale`` in fp32, where `wide` holds the values times ``2**power``."""
        rows, error = wide.shape[0], band.scratch
        assert error is not None  # it comes with the values
        factor = decode_into(band.data, self._half[:rows], error) * 2.0**power
        columns = self._tiling.columns
        for left, right in self._tiling.column_ranges(rows):
            tile, truth = error[:, left:right], wide[:, left:right]
            if band.amax.numel() == 1:
                torch.addcmul(truth, tile, band.multipliers * factor, value=-1, out=tile)
                continue
            first, count = left // columns, ceil_div(right - left, columns)
            scales = band.multipliers[:, first : first + count, None] * factor
            blocks = tile.view(rows, count, -1)
            torch.addcmul(truth.view(rows, count, -1), blocks, scales, value=-1, out=blocks)
        return error

    def _flushed(self, wide: torch.Tensor, band: QuantizedBand) -> int:
        """Values that are not 0 whose code is. Counted where a code is 0 at all: in few pieces."""
        magnitudes = self._magnitudes[: wide.shape[0]]
        torch.bitwise_and(band.data.view(torch.int8), 0x7F, out=magnitudes)
        pieces = magnitudes.view(-1, self._piece)
        found = (pieces.amin(1) == 0).nonzero().flatten()
        if not found.numel():
            return 0
        truth = wide.view(-1, self._piece)[found]
        return int(torch.count_nonzero(truth) - torch.count_nonzero(pieces[found]))

    def _clipped(self, wide: torch.Tensor, band: QuantizedBand) -> int:
        """Values beyond the format's range, under scales that may have been rounded down."""
        if bool((band.amax <= band.multipliers * (self._limit * _CLIP_TOLERANCE)).all()):
            return 0
        clipped = 0
        columns = self._tiling.columns
        for left, right in self._tiling.column_ranges(wide.shape[0]):
            first, count = left // columns, ceil_div(right - left, columns)
            bound = band.multipliers[:, first : first + count, None] * self._limit
            tile = wide[:, left:right].view(wide.shape[0], count, -1)
            clipped += int((tile.abs() > bound).sum())
        return clipped

    def _zero_blocks(self, band: QuantizedBand, first_row: int) -> int:
        if self._tiling.rows == self._tiling.n and first_row:
            return 0  # a scale of the whole tensor was counted with its first band
        return int((band.amax == 0).sum())

    def _sample(self, wide: torch.Tensor, first_row: int) -> torch.Tensor:
        offset = -(first_row * self._tiling.k) % self._every
        return wide.view(-1)[offset :: self._every].abs()
