"""From magnitudes to the amax of a scale: all of it, a percentile, or the least error."""

from __future__ import annotations

from typing import Literal

import torch

from fp8dispatch.calibrate.magnitudes import Magnitudes, bin_edges
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.formats import cast
from fp8dispatch.quantization.eager import scale_of

Method = Literal["max", "percentile", "mse"]
METHODS: tuple[Method, ...] = ("max", "percentile", "mse")
DEFAULT_PERCENTILE = 99.99

_POINTS = 16  # per bin: E4M3 has 8 values to an octave and a histogram 16 bins
_CANDIDATES_PER_OCTAVE = 8
_OCTAVES = 6


def check_method(method: object, percentile: object) -> None:
    """A known method, and a percentile above 0 and up to 100.

    Raises:
        InvalidInputError: anything else.
    """
    if method not in METHODS:
        raise InvalidInputError(f"method must be one of {', '.join(METHODS)}, found {method!r}")
    number = isinstance(percentile, (int, float)) and not isinstance(percentile, bool)
    if not number or not 0 < percentile <= 100:  # type: ignore[operator]
        raise InvalidInputError(
            f"percentile must be above 0 and at most 100, such as 99.99, found {percentile!r}"
        )


def amax_by(
    method: Method,
    magnitudes: Magnitudes,
    *,
    percentile: float = DEFAULT_PERCENTILE,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> float:
    """The magnitude that shall become the format's largest value.

    ``"max"`` clips nothing. ``"percentile"`` clips what lies above it. ``"mse"`` takes the limit
    with the least mean squared error of quantisation (see `least_error_amax`).
    """
    if method == "max":
        return magnitudes.amax
    if method == "percentile":
        # So many zeros that the percentile is one of them say nothing about a limit.
        return magnitudes.percentile(percentile) or magnitudes.amax
    return least_error_amax(magnitudes, dtype)


def least_error_amax(magnitudes: Magnitudes, dtype: torch.dtype = torch.float8_e4m3fn) -> float:
    """The limit, out of 49 from amax down to amax / 64, with the least squared error.

    Each bin stands for 16 values spread evenly over it. FP8 is a floating format, so halving the
    limit changes little until values are clipped; what the search finds is mostly how the largest
    values fall on the format's steps.
    """
    if magnitudes.amax == 0:
        return 0.0
    used = magnitudes.counts.nonzero().flatten()
    edges = bin_edges()
    lower, upper = edges[used], edges[used + 1].clamp(max=magnitudes.amax)
    steps = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    values = (lower[:, None] + (upper - lower)[:, None] * steps).flatten()
    weights = magnitudes.counts[used].double().repeat_interleave(_POINTS) / _POINTS
    fractions = torch.exp2(
        -torch.arange(_OCTAVES * _CANDIDATES_PER_OCTAVE + 1) / _CANDIDATES_PER_OCTAVE
    )
    limits = (fractions * magnitudes.amax).float()
    errors = []
    for scale in scale_of(limits, dtype):
        restored = cast(values.float() / scale, dtype).double() * scale.double()
        errors.append((weights * (restored - values).square()).sum())
    return float(limits[int(torch.stack(errors).argmin())])  # the first, so the largest, of equals
