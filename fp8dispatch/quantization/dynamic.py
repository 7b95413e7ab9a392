"""What every call does to its activations: [M, K] floats into FP8 data and scales, unchecked."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from fp8dispatch.probes.device import runs_kernels
from fp8dispatch.quantization import eager
from fp8dispatch.recipe import ceil_div


def quantize(
    x: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
    static_scale: torch.Tensor | None = None,
    *,
    pad_rows_to: int = 1,
    use_kernels: bool | None = None,
    rows_per_scale: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [M, K] activations with the fastest quantiser of their device.

    Args:
        x: [M, K] bf16, fp16 or fp32, any strides; unchecked.
        group_size: columns per scale; K or more gives one scale per token.
        static_scale: one fp32 element instead of computed scales.
        pad_rows_to: allocate rows up to this multiple; `data` and `scale` are then returned with
            the padding rows, which hold zeros with scale 1.
        use_kernels: run the Triton kernels or plain torch; None means the kernels on a GPU that
            they run on.
        rows_per_scale: rows that share a computed scale; plain torch alone takes more than one.

    Returns:
        data [M', K]; scale [S, groups] for S = ceil(M' / rows_per_scale), M-major (strides
        (1, S)), or one element when static.
    """
    if rows_per_scale > 1:
        use_kernels = False
    if use_kernels is None:
        use_kernels = runs_kernels(x.device)
    m, k = x.shape
    rows = ceil_div(m, pad_rows_to) * pad_rows_to
    if rows == m and not use_kernels:
        return quantize_eager(x, group_size, dtype, static_scale, rows_per_scale)
    groups = max(ceil_div(k, group_size), 1)
    data = torch.empty((rows, k), dtype=dtype, device=x.device)
    if static_scale is None:
        grid = (groups, ceil_div(rows, rows_per_scale))
        scale = torch.empty(grid, dtype=torch.float32, device=x.device).t()
    else:
        scale = static_scale.reshape(1, 1)
    used, used_scale = data, scale
    if rows > m:
        data[m:].view(torch.uint8).zero_()
        used = data[:m]
        if static_scale is None:
            scaled = ceil_div(m, rows_per_scale)
            scale[scaled:].fill_(1.0)
            used_scale = scale[:scaled]
    if use_kernels:
        _run_kernel(x, used, used_scale, group_size, static_scale)
    else:
        plain, plain_scale = quantize_eager(x, group_size, dtype, static_scale, rows_per_scale)
        used.copy_(plain)
        used_scale.copy_(plain_scale)
    return data, scale


@functools.cache  # an import statement in every call would cost a microsecond
def _kernels() -> ModuleType:
    # Imported late because it imports Triton, which is not a requirement of the package.
    from fp8dispatch.kernels import quantize_activation

    return quantize_activation


def _run_kernel(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    static_scale: torch.Tensor | None,
) -> None:
    kernel = _kernels()
    if static_scale is not None:
        kernel.quantize_static(x, data, static_scale)
    elif scale.shape[1] == 1:
        kernel.quantize_rows(x, data, scale)
    else:
        kernel.quantize_groups(x, data, scale, group_size)


def quantize_eager(
    x: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
    static_scale: torch.Tensor | None = None,
    rows_per_scale: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, without padding: what `eager` uses, and what defines the numbers."""
    if static_scale is not None:
        data = eager.quantize_static(x, static_scale, dtype)
        return data, static_scale.reshape(1, 1)
    columns = min(group_size, max(x.shape[1], 1))
    if rows_per_scale > 1:
        data, scale = eager.quantize_tiles(x, rows_per_scale, columns, dtype)
    else:
        data, scale = eager.quantize_grid(x, 1, columns, dtype)
    return data, scale.t().contiguous().t()
