"""The magnitudes of a tensor as counts in logarithmic bins, which add up exactly.

A bin is what the first bits of an fp32 number say: the exponent and four bits of the mantissa, so
16 bins to an octave and a relative width of at most 1/16. Binning is integer arithmetic on the
bits: the same on every device, and the sum of two histograms is the histogram of both tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

BINS_PER_OCTAVE = 16
BIN_COUNT = 255 * BINS_PER_OCTAVE
"""Bins of finite fp32 magnitudes: 255 exponents, subnormals among them, of 16 bins each."""

_SHIFT = 23 - 4
_ALL_BINS = 256 * BINS_PER_OCTAVE  # the last exponent holds infinity and NaN
_LARGEST = torch.finfo(torch.float32).max


def bin_edges() -> torch.Tensor:
    """The lower edges of all bins and the upper edge of the last, fp64 [BIN_COUNT + 1]."""
    bits = torch.arange(BIN_COUNT + 1, dtype=torch.int32) << _SHIFT
    edges = bits.view(torch.float32).double()
    edges[-1] = _LARGEST
    return edges


def _no_counts() -> torch.Tensor:
    return torch.zeros(BIN_COUNT, dtype=torch.int64)


@dataclass
class Magnitudes:
    """Counts of the magnitudes of everything that was added.

    Attributes:
        values: finite values, zeros included.
        zeros: values that are exactly zero.
        nonfinite: NaN and infinities, which are in no bin.
        amax: the largest finite magnitude.
        counts: int64 [BIN_COUNT] on the CPU, of the finite values that are not zero.
    """

    values: int = 0
    zeros: int = 0
    nonfinite: int = 0
    amax: float = 0.0
    counts: torch.Tensor = field(default_factory=_no_counts)

    @classmethod
    def of(cls, x: torch.Tensor) -> Magnitudes:
        """The magnitudes of a float tensor on any device; one transfer to the CPU."""
        flat = x.detach().reshape(-1).float().abs()
        bits = flat.view(torch.int32)
        counts = torch.bincount(bits >> _SHIFT, minlength=_ALL_BINS)
        zeros = (bits == 0).sum()
        finite = torch.where(flat.isfinite(), flat, 0)
        amax = finite.amax() if flat.numel() else flat.sum()
        # The bits of amax travel as an integer, so that everything comes in one copy.
        packed = torch.cat([counts, zeros[None], amax.view(torch.int32).long()[None]]).cpu()
        counts = packed[:BIN_COUNT].clone()
        counts[0] -= packed[-2]
        nonfinite = int(packed[BIN_COUNT:_ALL_BINS].sum())
        return cls(
            values=x.numel() - nonfinite,
            zeros=int(packed[-2]),
            nonfinite=nonfinite,
            amax=packed[-1:].to(torch.int32).view(torch.float32).item(),
            counts=counts,
        )

    def add(self, other: Magnitudes) -> None:
        """Count the other's values too: exactly as if both tensors had been one."""
        self.values += other.values
        self.zeros += other.zeros
        self.nonfinite += other.nonfinite
        self.amax = max(self.amax, other.amax)
        self.counts += other.counts

    def percentile(self, q: float) -> float:
        """The magnitude that `q` percent of the finite values do not exceed.

        It is interpolated within its bin, so it is off by 1/16 at most, and never above `amax`.

        Args:
            q: above 0 and up to 100, which gives `amax`.
        """
        if self.values == 0 or q >= 100:
            return self.amax
        wanted = q / 100 * self.values - self.zeros
        if wanted <= 0:
            return 0.0
        below = self.counts.cumsum(0).double()
        index = int(torch.searchsorted(below, torch.tensor([wanted], dtype=torch.float64)))
        index = min(index, BIN_COUNT - 1)
        edges = bin_edges()
        inside = wanted - (float(below[index - 1]) if index else 0.0)
        share = inside / max(int(self.counts[index]), 1)
        value = float(edges[index] + (edges[index + 1] - edges[index]) * share)
        return min(value, self.amax)

    def share_above(self, limit: float) -> float:
        """The share of the finite values whose magnitude exceeds `limit`, 0 to 1."""
        if self.values == 0 or limit >= self.amax:
            return 0.0
        return 1 - self._share_up_to(limit)

    def share_lost_below(self, limit: float) -> float:
        """The share of the finite values that are below `limit` and not zero, 0 to 1."""
        if self.values == 0:
            return 0.0
        if limit > self.amax:
            return 1 - self.zeros / self.values
        return self._share_up_to(limit) - self.zeros / self.values

    def _share_up_to(self, limit: float) -> float:
        edges = bin_edges()
        width = edges[1:] - edges[:-1]
        covered = ((limit - edges[:-1]) / width).clamp(0, 1)  # of each bin, as if it were uniform
        return (float((self.counts.double() * covered).sum()) + self.zeros) / self.values
