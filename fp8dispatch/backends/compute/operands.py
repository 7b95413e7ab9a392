"""Operands in the layouts that other people's libraries read, on the device that they launch on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_ALIGNMENT = 16


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one: these libraries launch on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and at an address that bulk copies take; copied only where it is not."""
    tensor = tensor.contiguous()
    if tensor.data_ptr() % _ALIGNMENT:
        tensor = tensor.clone()
    if tensor.dim() == 2 and tensor.stride() != (tensor.shape[1], 1):
        # Torch calls one row contiguous whatever its stride; a bulk copy is told the stride.
        tensor = tensor.as_strided(tensor.shape, (tensor.shape[1], 1))
    return tensor


def padded_rows(data: torch.Tensor, rows: int) -> torch.Tensor:
    """FP8 [M, K] as an aligned, contiguous [rows, K] whose extra rows are zero."""
    m, k = data.shape
    if m == rows:
        return aligned(data)
    padded = torch.zeros((rows, k), dtype=torch.uint8, device=data.device)
    padded[:m] = data.view(torch.uint8)
    return padded.view(data.dtype)


def row_scales(scale: torch.Tensor, m: int) -> torch.Tensor:
    """Scales [M, 1], or one for all, as a contiguous [m]; rows beyond m are dropped."""
    if scale.numel() == 1:
        return scale.reshape(1).expand(m).contiguous()
    return aligned(scale[:m, 0])


def group_scales(scale: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Scales [M, groups], or one for all, as a contiguous [groups, rows]: M-major.

    Rows beyond those given have scale 1. Not copied where `scale` is the transpose of just that,
    as our quantisers write it.
    """
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(groups, rows).contiguous()
    if scale.shape[0] == rows:
        return aligned(scale.t())
    padded = torch.ones((groups, rows), dtype=torch.float32, device=scale.device)
    padded[:, : scale.shape[0]] = scale.t()
    return padded
