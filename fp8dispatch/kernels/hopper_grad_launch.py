"""Launches `hopper_grad_input`: from tensors to tensor maps, constants and a grid."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fp8dispatch.kernels.gluon_compat import gl
from fp8dispatch.kernels.gluon_launch import Box, Kernel, View, kernel_for
from fp8dispatch.kernels.hopper_grad_config import STEP, GradConfig, choose_grad_config
from fp8dispatch.kernels.hopper_grad_input import hopper_grad_input
from fp8dispatch.kernels.launch import ceil_div, device_limits, on_device_of
from fp8dispatch.workspace import workspace

_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes


class _Scales(NamedTuple):
    """What the kernel is compiled for of the weight's scales, in the order of its parameters.

    Attributes:
        rows: one scale for each row.
        scale_n, scale_k: sides of a block, 0 where it reaches over everything.
    """

    rows: bool
    scale_n: int
    scale_k: int


def _scales_of(n: int, k: int, block_size: tuple[int, int] | None) -> _Scales | None:
    """How scales lie over the weight; None where the kernel does not take them so."""
    block_n, block_k = (1, k) if block_size is None else block_size
    scale_n, scale_k = 0 if block_n >= n else block_n, 0 if block_k >= k else block_k
    if scale_n == 1 and scale_k == 0:
        return _Scales(True, 0, 0)
    if scale_n % STEP or scale_k % 128:
        return None
    return _Scales(False, scale_n, scale_k)


def takes_sizes(n: int, k: int, block_size: tuple[int, int] | None) -> bool:
    """Whether the kernel multiplies by weights [n, k] with scales for such blocks.

    N must be a multiple of 8 and K of 16, since TMA's strides are multiples of 16 bytes; a block
    has a multiple of 64 rows and of 128 columns, or reaches over all of them; or it is a whole row.
    """
    return n % 8 == 0 and k % 16 == 0 and _scales_of(n, k, block_size) is not None


def takes(
    grad: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    block_size: tuple[int, int] | None,
) -> bool:
    """Whether the kernel takes a call; the arguments are those of `grad_input`."""
    n, k = data.shape
    return (
        grad.dtype in _DTYPES
        and out.dtype == grad.dtype
        and data.dtype == torch.float8_e4m3fn
        and scale.dtype == torch.float32
        and takes_sizes(n, k, block_size)
        and scale.is_contiguous()
        and all(one.data_ptr() % _ALIGNMENT == 0 for one in (grad, data, scale, out))
        and all(map(_lies_in_rows, (grad, data, out)))
    )


def _lies_in_rows(matrix: torch.Tensor) -> bool:
    """Rows side by side in memory, at multiples of 16 bytes."""
    rows, columns = matrix.shape
    if columns > 1 and matrix.stride(1) != 1:
        return False
    stride = matrix.stride(0)
    return rows <= 1 or (stride >= columns and stride * matrix.itemsize % _ALIGNMENT == 0)


def grad_input(
    grad: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    block_size: tuple[int, int] | None,
    config: GradConfig | None = None,
) -> None:
    """Multiply the gradient of the output by the dequantised weight into `out`.

    Args:
        grad: ``[M, N]``, bfloat16 or float16: dY.
        data: ``[N, K]``, float8_e4m3fn.
        scale: contiguous float32 multipliers, ``[ceil(N / block_n), ceil(K / block_k)]``, or
            ``[N, 1]`` without `block_size`.
        out: ``[M, K]`` in dY's dtype; every element is written.
        block_size: ``(block_n, block_k)`` of the scale, or None for one scale per row of `data`.
        config: the shape of the kernel; by default `choose_grad_config` decides.

    Nothing is checked: `takes` says what may be given.

    Raises:
        BackendUnavailableError: the first call of its kind while a CUDA graph is captured.
    """
    (m, n), k = grad.shape, data.shape[1]
    if m == 0:
        return
    scales = _scales_of(n, k, block_size)
    if scales is None:
        raise ValueError(f"needs scales that `takes_sizes` allows, found blocks {block_size}")
    device = grad.device
    multiprocessors = device_limits(device).multiprocessors
    if config is None:
        config = choose_grad_config(m, n, k, multiprocessors)
    split = min(config.split, ceil_div(n, STEP))  # no part is empty
    # One kernel serves all splits.
    config, kind = config._replace(split=split), config._replace(split=min(split, 2))
    views: tuple[View, ...] = (
        (grad, (m, n), (_stride(grad), 1)),
        (data, (n, k), (_stride(data), 1)),
        (out, (m, k), (_stride(out), 1)),
    )
    rest: tuple[Any, ...] = (None,)
    if scales.rows:
        # The pitch of a single row is never used, but must be legal.
        views, rest = (*views, (scale, (1, n), (ceil_div(n, 4) * 4, 1))), ()
    elements, counters = config.workspace(m, k)
    make = functools.partial(_kernel, kind, scales)
    key = ("grad_input", grad.get_device(), kind, scales, grad.dtype)
    items = config.tiles(m, k) * config.split
    with on_device_of(grad):
        memory = workspace(device, elements, counters) if elements else (scale, scale)
        kernel_for(key, make)(
            (min(items, multiprocessors), 1),
            views,
            (*rest, scale, *memory, m, n, k, split),
            grad.get_device(),
        )


def _stride(matrix: torch.Tensor) -> int:
    """Of rows, as a tensor map takes it: that of a single row may be anything."""
    rows, columns = matrix.shape
    return matrix.stride(0) if rows > 1 else ceil_div(columns, _ALIGNMENT) * _ALIGNMENT


def _kernel(config: GradConfig, scales: _Scales) -> Kernel:
    rows, _ = config.tile
    halves = gl.NVMMASharedLayout(128, 16, 2)
    boxes: list[Box] = [
        ([rows, STEP], halves),
        ([STEP, 128], gl.NVMMASharedLayout(128, 8, 2)),
        ([min(config.block_m, 32), 128], halves),
    ]
    if scales.rows:
        layout = gl.NVMMASharedLayout.get_default_for([1, STEP], gl.float32)
        boxes.append(([1, STEP], layout))
    constants = {
        "ROWS": scales.rows,
        "SCALE_N": scales.scale_n,
        "SCALE_K": scales.scale_k,
        "BLOCK_M": config.block_m,
        "TALL": config.tall,
        "STAGES": config.stages,
        "SPLIT": config.split > 1,
        "GROUP_M": config.group_m,
        "BUFFERS": config.buffers,
        "AHEAD": config.ahead,
    }
    return Kernel(hopper_grad_input, boxes, constants, 4)
