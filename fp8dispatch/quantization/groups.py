"""Raw E4M3 bytes with one scale per group of columns, as a packing script writes them."""

from __future__ import annotations

import torch

from fp8dispatch.checks import check_activations, check_size
from fp8dispatch.errors import NumericalOverflowError, ShapeError
from fp8dispatch.formats import cast, max_value
from fp8dispatch.quantization.eager import expand_grid, grid_amax

_SCALE_FLOOR = 1e-8


def pack_to_fp8_e4m3(x: torch.Tensor, group: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """True E4M3 bytes (not offset codes), and one fp32 scale for each `group` columns of a row.

    ``scale = max(amax / 448, 1e-8)`` and ``x = decode(bytes, torch.float8_e4m3fn) * scale``: it
    multiplies. A group never reaches over the end of a row. `fp8dispatch.quantize` with the recipe
    block and ``block_size=(1, group)`` does the same with a scale of 1 for zeros, and takes rows
    of any length.

    Args:
        x: [..., K] bfloat16, float16 or float32, K a multiple of `group`.
        group: columns per scale.

    Returns:
        uint8 [..., K], and fp32 [numel / group]: the groups of the first row, of the second, ...

    Raises:
        DTypeError, ShapeError: arguments that do not fit.
        NumericalOverflowError: NaN or infinity in `x`.
    """
    check_activations("x", x)
    check_size("group", group)
    k = x.shape[-1]
    if k % group:
        raise ShapeError(
            f"the last dimension must be a multiple of group={group}, found {list(x.shape)}; use "
            f"quantize(x, 'block', block_size=(1, {group})), which takes ragged rows"
        )
    rows = x.detach().reshape(-1, k)
    amax = grid_amax(rows, 1, group)
    if not bool(torch.isfinite(amax).all()):
        raise NumericalOverflowError(
            "pack_to_fp8_e4m3 needs finite values, found NaN or infinity in x; repair it first"
        )
    # A tensor for the divisor: by a number CUDA multiplies with the rounded reciprocal.
    scale = (amax / torch.full_like(amax, max_value(torch.float8_e4m3fn))).clamp(min=_SCALE_FLOOR)
    data = cast(rows.float() / expand_grid(scale, 1, group, rows.shape), torch.float8_e4m3fn)
    return data.view(torch.uint8).view(x.shape), scale.flatten()
