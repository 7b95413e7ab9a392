"""Launches the Hopper kernels: from tensors to tensor maps, constants and a grid."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fp8dispatch.kernels.gluon_compat import gl
from fp8dispatch.kernels.gluon_launch import Box, Kernel, View, kernel_for
from fp8dispatch.kernels.hopper_config import HopperConfig
from fp8dispatch.kernels.hopper_decode import hopper_decode
from fp8dispatch.kernels.hopper_gemm import hopper_gemm
from fp8dispatch.kernels.hopper_split import hopper_gemm_split
from fp8dispatch.kernels.launch import ceil_div, device_limits, on_device_of

_BUFFERS = 2  # pieces of output that a consumer may have on their way
_DTYPES = {
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}


def is_masked(n: int, out_dtype: torch.dtype) -> bool:
    """Whether rows of N outputs are no multiple of 16 bytes, which TMA stores need."""
    return n * out_dtype.itemsize % 16 != 0


def scales_fit(scale: torch.Tensor) -> bool:
    """Whether activation scales [M, groups] lie as the GEMM's tensor map needs them.

    M side by side, and the groups at multiples of 16 bytes.
    """
    rows, groups = scale.shape
    fits_m = rows == 1 or scale.stride(0) == 1
    fits_k = groups == 1 or (scale.stride(1) % 4 == 0 and scale.stride(1) >= rows)
    return fits_m and fits_k and scale.data_ptr() % 16 == 0


def hopper_linear(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: HopperConfig,
    workspace: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Multiply quantised activations by a quantised weight into `out`; nothing is checked.

    Args:
        a: ``[M, K]`` float8_e4m3fn, rows at multiples of 16 bytes.
        a_scale: float32 ``[M, ceil(K / 128)]``, or ``[M, 1]`` in the row-wise recipe. Any strides
            for decode, else as `scales_fit` tells.
        b: ``[N, K]`` float8_e4m3fn, rows at multiples of 16 bytes.
        b_scale: contiguous float32 ``[ceil(N / 128), ceil(K / 128)]``; ``[N]`` or ``[1]``
            (one-dimensional) in the row-wise recipe.
        bias: ``[N]`` contiguous, any float dtype, or None.
        out: ``[M, N]`` contiguous bfloat16, float16 or float32; every element is written.
        config: the kernel.
        workspace: float32 and zeroed int32 memory of `HopperConfig.workspace`, of this stream
            alone; None where it asks for none.

    All tensors are on one device and aligned to 16 bytes.
    """
    m, k = a.shape
    n = b.shape[0]
    blockwise = b_scale.dim() == 2
    scale_stride = 0 if b_scale.numel() == 1 else 1
    masked = is_masked(n, out.dtype)
    device: int = a.get_device()
    key = (
        device,
        config,
        n,
        k,
        blockwise,
        scale_stride,
        out.dtype,
        None if bias is None else bias.dtype,
    )
    partials, counters = (out, out) if workspace is None else workspace
    make: Any
    rest: tuple[Any, ...]
    if config.kind == "decode":
        make = functools.partial(_decode_kernel, config, n, k, blockwise, scale_stride)
        views = _decode_views(a, b, k % 128 != 0)
        strides = a_scale.stride()
        rest = (a_scale, b_scale, bias, out, partials, counters, m, *strides)
        grid = (ceil_div(n, config.block_n), config.split)
    else:
        make = functools.partial(_gemm_kernel, config, n, k, blockwise, scale_stride, out.dtype)
        views = _gemm_views(a, a_scale, b, None if masked else out)
        tiles = config.tiles(m, n)
        rest = (b_scale, bias, m)
        if masked:
            rest = (out, *rest)
        if config.kind == "split":
            rest = (*rest[:-1], partials, counters, m)
            grid = (tiles * config.split, 1)
        else:
            grid = (min(tiles, device_limits(a.device).multiprocessors), 1)
    with on_device_of(a):
        kernel_for(key, make)(grid, views, rest, device)


def _gemm_views(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None
) -> list[View]:
    m, k = a.shape
    groups = a_scale.shape[1]
    # The pitch of a single group, and the stride of a single row, are never used but must be legal.
    pitch = a_scale.stride(1) if groups > 1 else ceil_div(m, 4) * 4
    views: list[View] = [
        (a, (m, k), (a.stride(0) if m > 1 else k, 1)),
        (b, (b.shape[0], k), (b.stride(0) if b.shape[0] > 1 else k, 1)),
        (a_scale, (groups, m), (pitch, 1)),
    ]
    if out is not None:
        n = out.shape[1]
        views.append((out, (m, n), (n, 1)))
    return views


def _decode_views(a: torch.Tensor, b: torch.Tensor, flat: bool) -> list[View]:
    views: list[View] = []
    for operand in (b, a):
        rows, k = operand.shape
        stride = operand.stride(0) if rows > 1 else k
        if flat:
            views.append((operand, (rows, k), (stride, 1)))
        else:
            views.append((operand, (k // 128, rows, 128), (128, stride, 1)))
    return views


def _box(block: list[int], dtype: torch.dtype) -> Box:
    return block, gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])


def _gemm_kernel(
    config: HopperConfig,
    n: int,
    k: int,
    blockwise: bool,
    scale_stride: int,
    out_dtype: torch.dtype,
) -> Kernel:
    masked = is_masked(n, out_dtype)
    boxes = [
        _box([128, 128], torch.float8_e4m3fn),
        _box([config.block_n, 128], torch.float8_e4m3fn),
        _box([1, 128], torch.float32),
    ]
    if not masked:
        boxes.append(_box([64, 128 // out_dtype.itemsize], out_dtype))
    constants = {
        "N": n,
        "K": k,
        "BLOCKWISE": blockwise,
        "SCALE_STRIDE": scale_stride,
        "MASKED": masked,
    }
    if config.kind == "split":
        constants |= {"STAGES": config.stages, "SPLIT": config.split}
        constants |= {"BUFFERS": _BUFFERS, "UNROLL": config.unroll}
        return Kernel(hopper_gemm_split, boxes, constants, 4)
    constants |= {"BLOCK_N": config.block_n, "STAGES": config.stages, "GROUP_M": config.group_m}
    constants |= {"EVEN": config.even, "BUFFERS": _BUFFERS, "UNROLL": config.unroll}
    return Kernel(hopper_gemm, boxes, constants, 4)


def _decode_kernel(
    config: HopperConfig, n: int, k: int, blockwise: bool, scale_stride: int
) -> Kernel:
    flat = k % 128 != 0
    layout = gl.NVMMASharedLayout(128, 8, 2 if flat else 3)
    lead = [] if flat else [config.chunk]
    boxes = [
        ([*lead, config.block_n, 128], layout),
        ([*lead, config.block_m, 128], layout),
    ]
    constants = {
        "N": n,
        "K": k,
        "BLOCKWISE": blockwise,
        "SCALE_STRIDE": scale_stride,
        "FLAT": flat,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SPLIT": config.split,
        "CHUNK": config.chunk,
        "STAGES": config.stages,
    }
    return Kernel(hopper_decode, boxes, constants, config.warps)
