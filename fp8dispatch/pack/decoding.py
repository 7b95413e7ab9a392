"""E4M3 codes into fp32, several times faster than torch's cast on a CPU."""

from __future__ import annotations

import torch


def decode_into(data: torch.Tensor, half: torch.Tensor, values: torch.Tensor) -> float:
    """Decode E4M3 codes without NaN into fp32.

    The code's bits are those of a half: exponent and mantissa move up by seven, and only the bias
    of the exponent differs (15 against 7, or 8 in FNUZ), which is a power of two.

    Args:
        data: float8_e4m3fn or float8_e4m3fnuz.
        half: int16 of the same shape, overwritten.
        values: fp32 of the same shape, filled.

    Returns:
        the factor that `values` are still to be multiplied with.
    """
    half.copy_(data.view(torch.int8))  # the sign is extended to the top bits
    half.bitwise_left_shift_(7).bitwise_and_(-0x4080)  # and cleared in the exponent's top bit
    values.copy_(half.view(torch.float16))
    return 2.0**8 if data.dtype == torch.float8_e4m3fn else 2.0**7
