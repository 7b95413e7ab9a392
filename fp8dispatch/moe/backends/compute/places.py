"""Quantised rows to the places that a library wants them in, and its results back."""

from __future__ import annotations

import torch


def gathered(data: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Rows of FP8 data [T, K] by an index [P]; a new, contiguous [P, K]."""
    # Bytes are indexed, since torch has no indexing for every FP8 dtype everywhere.
    return data.view(torch.uint8)[source].view(data.dtype)


def row_scales(scale: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Scales of the same rows, fp32 [P], of scales [T, 1] or of one for all."""
    if scale.numel() == 1:
        return scale.reshape(1).expand(source.shape[0]).contiguous()
    return scale[:, 0][source]


def brought_back(computed: torch.Tensor, target: torch.Tensor, rows: int) -> torch.Tensor:
    """Results [P, N] at their rows [P] of the output, [rows, N]; other rows are zero.

    Places without a row name `rows`, one more than there are, which is not returned.
    """
    shape = (rows + 1, computed.shape[1])
    out = torch.zeros(shape, dtype=computed.dtype, device=computed.device)
    return out.index_copy_(0, target, computed)[:rows]
