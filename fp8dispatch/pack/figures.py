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
from fp8dispatch.pack.strips import QuantizedBand, Tiling
from fp8dispatch.recipe import ceil_div

SUSPICIOUS_SQNR = 28.0
"""E4M3 gives about 31.5 dB at every granularity; a weight below this was spoilt by something."""
SAMPLE = 1 << 17
"""Values of a tensor that its percentile is taken from, evenly spaced."""
_CLIP_TOLERANCE = 1 + 1e-6  # the quotient of an amax and its rounded scale


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

    Args:
        tiling: of the whole weight.
        dtype: FP8 dtype of the weight, by its torch name: E4M3 or its FNUZ form.
    """

    def __init__(self, tiling: Tiling, dtype: str) -> None:
        self._tiling, self._limit = tiling, max_value(getattr(torch, dtype))
        shape = (tiling.band, tiling.k)
        self._wide = torch.empty(shape, dtype=torch.float32)
        self._restored = torch.empty(shape, dtype=torch.float32)
        self._half = torch.empty(shape, dtype=torch.int16)
        self._every = max(1, tiling.n * tiling.k // SAMPLE)

    def measure(self, values: torch.Tensor, band: QuantizedBand, first_row: int) -> Sums:
        """Compare a band with what it was made of.

        Args:
            values: [rows, K] as given to `BandQuantizer.quantize`.
            band: what that returned.
            first_row: of the band in the weight; it decides which values are sampled.
        """
        rows = values.shape[0]
        peak = float(band.amax.max())
        # A power of two keeps the squares of any bf16 within fp32, and changes no digit.
        power = 0 if peak == 0 else min(126, max(-126, -math.frexp(peak)[1]))
        wide = self._wide[:rows].copy_(values)
        sums = Sums(
            values=wide.numel(),
            amax=peak,
            scale_min=float(band.multipliers.min()),
            scale_max=float(band.multipliers.max()),
            zero_blocks=self._zero_blocks(band, first_row),
            clipped=self._clipped(wide, band),
            sample=[self._sample(wide, first_row)],
        )
        restored = self._restore(band, rows)
        sums.flushed = int(torch.count_nonzero(wide) - torch.count_nonzero(restored))
        if power:
            wide.mul_(2.0**power)
            restored.mul_(2.0**power)
        up = 2.0**-power
        one, other = wide.view(-1), restored.view(-1)
        sums.signal = float(one.dot(one)) * up * up
        sums.restored = float(other.dot(other)) * up * up
        sums.product = float(one.dot(other)) * up * up
        error = other.sub_(one)
        sums.noise = float(error.dot(error)) * up * up
        sums.max_abs_error = max(float(error.amax()), -float(error.amin())) * up
        return sums

    def _restore(self, band: QuantizedBand, rows: int) -> torch.Tensor:
        """``data * scale`` in fp32."""
        restored = self._restored[:rows]
        factor = decode_into(band.data, self._half[:rows], restored)
        columns = self._tiling.columns
        for left, right in self._tiling.column_ranges(rows):
            tile = restored[:, left:right]
            if band.amax.numel() == 1:
                tile.mul_(band.multipliers * factor)
                continue
            first, count = left // columns, ceil_div(right - left, columns)
            scales = band.multipliers[:, first : first + count, None] * factor
            tile.view(rows, count, -1).mul_(scales)
        return restored

    def _clipped(self, wide: torch.Tensor, band: QuantizedBand) -> int:
        """Values beyond the format's range; only scales that were rounded down can have any."""
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


def decode_into(data: torch.Tensor, half: torch.Tensor, values: torch.Tensor) -> float:
    """Decode E4M3 codes without NaN into fp32, several times faster than torch's cast.

    The code's bits are those of a half: exponent and mantissa move up by seven, and only the bias
    of the exponent differs (15 against 7, or 8 in FNUZ), which is a power of two.

    Args:
        data: float8_e4m3fn or float8_e4m3fnuz.
        half: int16 of the same shape, overwritten.
        values: fp32 of the same shape, filled.

    Returns:
        the factor that `values` are still to be multiplied with.
    """
    half.copy_(data.view(torch.int8))  # the sign is extended to the top bit
    sign = half & -0x8000
    half.bitwise_and_(0x7F).bitwise_left_shift_(7).bitwise_or_(sign)
    values.copy_(half.view(torch.float16))
    return 2.0**8 if data.dtype == torch.float8_e4m3fn else 2.0**7
