"""How the hub kernel states what a weight scale means, in our terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8dispatch.checks import check_dense
from fp8dispatch.errors import DTypeError, ShapeError

MX_GROUP = (1, 32)


def is_tensor_wide(B: torch.Tensor, block_size: Sequence[int] | None) -> bool:
    """One scale holds for a whole weight: no block size, or one as large as the weight."""
    return block_size is None or tuple(block_size) == tuple(B.shape[-2:])


def tensor_scale(B: torch.Tensor, Bs: torch.Tensor) -> torch.Tensor:
    """One scale for each weight: one element for [N, K]; [E] for [E, N, K], of E or of one.

    Raises:
        ShapeError: another number of scales.
    """
    check_dense("B", B)
    check_dense("Bs", Bs)
    experts = B.shape[0] if B.dim() == 3 else 1
    if Bs.numel() not in (1, experts):
        raise ShapeError(
            f"Bs of tensor-wide weights {list(B.shape)} must hold 1 or {experts} scales, found "
            f"{list(Bs.shape)}; pass block_size for scales of blocks"
        )
    return Bs.reshape(-1) if Bs.numel() == experts else Bs.reshape(1).expand(experts)


def version_4(
    B: torch.Tensor, Bs: torch.Tensor, block_size: Sequence[int] | None
) -> tuple[torch.Tensor, Sequence[int] | None]:
    """The scale and the block size that version 4 reads from a weight and its scale.

    It takes E8M0 scales of groups of 32 columns as MXFP8 whatever the block size says. The
    activations are then quantised in the same groups, with fp32 scales where it rounds them up to
    powers of two.

    Raises:
        DTypeError: packed FP4 weights.
    """
    check_dense("B", B)
    check_dense("Bs", Bs)
    if B.dtype in (torch.int8, torch.uint8):
        raise DTypeError(
            f"B must be an FP8 weight, found {B.dtype} as packed FP4 has it; FP4 weights are not "
            f"supported, dequantise them and quantise again to FP8"
        )
    e8m0 = Bs.dtype in (torch.uint8, torch.float8_e8m0fnu)
    if e8m0 and B.shape[-1] % 32 == 0 and Bs.shape == (*B.shape[:-1], B.shape[-1] // 32):
        return Bs, MX_GROUP
    if is_tensor_wide(B, block_size):
        return tensor_scale(B, Bs), None
    return Bs, block_size
