"""The FP8 formats as their definitions give them: every code's value, and rounding to nearest even.

Written apart from the library, from "FP8 Formats for Deep Learning" (arXiv:2209.05433) and LLVM's
Float8E4M3FNUZ and Float8E5M2FNUZ.
"""

from __future__ import annotations

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E4M3_FNUZ, E5M2_FNUZ = torch.float8_e4m3fnuz, torch.float8_e5m2fnuz

# (exponent bits, mantissa bits, bias, largest finite value, codes of NaN, codes of infinity)
LAYOUTS = {
    E4M3: (4, 3, 7, 448.0, {0x7F, 0xFF}, set()),
    E5M2: (5, 2, 15, 57344.0, {0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF}, {0x7C, 0xFC}),
    E4M3_FNUZ: (4, 3, 8, 240.0, {0x80}, set()),
    E5M2_FNUZ: (5, 2, 16, 57344.0, {0x80}, set()),
}


def finite_codes(dtype: torch.dtype) -> dict[int, float]:
    """Code -> value of every finite code, from the format's definition."""
    _, mantissa_bits, bias, _, nans, infinities = LAYOUTS[dtype]
    values = {}
    for code in range(256):
        if code in nans | infinities:
            continue
        exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        leading = 1 if exponent else 0
        size = (leading + mantissa / 2**mantissa_bits) * 2.0 ** (max(exponent, 1) - bias)
        values[code] = -size if code & 0x80 else size
    return values


def nearest_even(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes [n] of float64 values [n]: clamped, to the nearest, ties to the even mantissa."""
    table = {code: value for code, value in finite_codes(dtype).items() if code < 0x80}
    codes = sorted(table, key=table.__getitem__)
    grid = torch.tensor([table[code] for code in codes], dtype=torch.float64)
    size = values.abs().clamp(max=grid[-1])
    upper = torch.searchsorted(grid, size).clamp(1, len(grid) - 1)
    lower = upper - 1
    to_lower, to_upper = size - grid[lower], grid[upper] - size
    even = torch.where(lower % 2 == 0, lower, upper)  # codes count up, and so do the mantissas
    index = torch.where(to_lower < to_upper, lower, torch.where(to_lower > to_upper, upper, even))
    positive = torch.tensor(codes)[index]
    # The FNUZ formats have no negative zero: its code is NaN.
    no_minus = (positive == 0) if dtype in (E4M3_FNUZ, E5M2_FNUZ) else torch.zeros_like(index) > 0
    return torch.where(torch.signbit(values) & ~no_minus, positive + 0x80, positive)
