"""E4M3 and E5M2 bytes as FNUZ bytes, which compute capability gfx942 (MI300) multiplies.

The FNUZ formats have the same fields with an exponent bias one higher, so the same bits mean half
the value and a doubled scale restores it (LLVM's Float8E4M3FNUZ and Float8E5M2FNUZ). Two kinds of
codes mean something else: negative zero, whose code is FNUZ's only NaN, and the NaN codes, which
FNUZ reads as its largest values.
"""

from __future__ import annotations

import torch

from fp8dispatch.checks import check_dense, check_dtype
from fp8dispatch.errors import NumericalOverflowError
from fp8dispatch.formats import E8M0_NAN, SCALE_DTYPES, dtype_name

FNUZ_OF: dict[torch.dtype, torch.dtype] = {
    torch.float8_e4m3fn: torch.float8_e4m3fnuz,
    torch.float8_e5m2: torch.float8_e5m2fnuz,
}
_FNUZ_NAN = 0x80


def convert_to_fnuz(data: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An FP8 tensor and its scale in the FNUZ format of the same name: the same values, exactly.

    Negative zero becomes zero, and NaN stays NaN.

    Args:
        data: float8_e4m3fn or float8_e5m2, any shape.
        scale: multipliers, ``value = data * scale``, in any shape and any of `SCALE_DTYPES`.

    Returns:
        data in float8_e4m3fnuz or float8_e5m2fnuz, and the doubled scale in its dtype.

    Raises:
        DTypeError: other dtypes.
        NumericalOverflowError: an infinity of E5M2, which FNUZ does not have, or a scale whose
            double does not fit its dtype.
    """
    check_dense("data", data)
    check_dtype("data", data, tuple(FNUZ_OF), "only the OCP formats are converted")
    doubled = double_scale(scale)
    if bool(data.float().isinf().any()):
        raise NumericalOverflowError(
            "float8_e5m2fnuz has no infinity, found one in data; quantise the values again with "
            "nonfinite='saturate'"
        )
    codes = data.contiguous().view(torch.uint8)
    codes = torch.where(codes == 0x80, 0, codes)
    codes = torch.where(data.float().isnan(), _FNUZ_NAN, codes)
    return codes.to(torch.uint8).view(FNUZ_OF[data.dtype]), doubled


def double_scale(scale: torch.Tensor) -> torch.Tensor:
    """Twice the scale, exactly: of a weight, of static activations or of a KV cache in FNUZ.

    Args:
        scale: any shape, any of `SCALE_DTYPES`; uint8 means E8M0 exponents.

    Raises:
        DTypeError: another dtype.
        NumericalOverflowError: the double does not fit the dtype.
    """
    check_dense("scale", scale)
    check_dtype("scale", scale, SCALE_DTYPES, "convert it to float32")
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = scale.contiguous().view(torch.uint8)
        fits = bool((exponents < E8M0_NAN - 1).all())
        doubled = (exponents + 1).view(scale.dtype)
    else:
        doubled = scale * 2
        fits = bool(doubled.isfinite().all())
    if not fits:
        raise NumericalOverflowError(
            f"a doubled scale must fit {dtype_name(scale.dtype)}, found one that does not; convert "
            f"the scales to float32 first"
        )
    return doubled
