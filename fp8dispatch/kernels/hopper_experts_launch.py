"""Launches `hopper_experts`: from routing and tensors to sorted rows, tensor maps and a grid."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fp8dispatch.kernels.experts_routing import schedule, tile_bound
from fp8dispatch.kernels.gluon_compat import gl
from fp8dispatch.kernels.gluon_launch import Kernel, kernel_for, launch
from fp8dispatch.kernels.hopper_experts import hopper_experts
from fp8dispatch.kernels.hopper_experts_config import (
    GROUP_M,
    STAGES,
    TILE_COLUMNS,
    TILE_ROWS,
    scale_columns,
)
from fp8dispatch.kernels.hopper_experts_rows import GROUP, prepare_rows
from fp8dispatch.kernels.launch import ceil_div, device_limits, on_device_of
from fp8dispatch.kernels.sorted_rows import SortedRows

_STORE = 16  # bytes


def experts_matmul(
    x: torch.Tensor,
    static_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    routed: SortedRows,
) -> None:
    """Quantise rows and multiply each by the quantised weight of its expert into `out`.

    Args:
        x: ``[T, K]``, bfloat16, float16 or float32, any strides; K is a multiple of 16.
        static_scale: float32 ``[E]`` of any stride, or None for computed scales: one for each row
            and 128 columns, or in the row-wise recipe for each row.
        b: ``[E, N, K]`` float8_e4m3fn, last stride 1, the others multiples of 16.
        b_scale: contiguous float32 multipliers, ``[E, ceil(N / 128), ceil(K / 128)]``; ``[E, N]``
            or ``[E, 1]`` in the row-wise recipe.
        bias: ``[E, N]`` contiguous, any float dtype, or None.
        out: ``[rows, N]`` contiguous; rows that `scatter` does not name are left as they are,
            those of no expert become zeros.
        routed: Which rows go to which expert; at least one row.

    All tensors are on one device; b, scale, bias and out are aligned to 16 bytes.

    Raises:
        BackendUnavailableError: the first call of its kind while a CUDA graph is captured.
    """
    rows, (experts, n, k), device = routed.rows, b.shape, x.device
    blockwise = b_scale.dim() == 3
    groups = ceil_div(k, GROUP) if blockwise else 1
    most_tiles = tile_bound(rows, experts, TILE_ROWS)
    data = torch.empty((rows, k), dtype=b.dtype, device=device)
    columns = scale_columns(rows, experts)
    scale = torch.empty((groups, columns), dtype=torch.float32, device=device)
    index = torch.empty((2, experts + 1), dtype=torch.int32, device=device)
    targets = torch.empty(rows, dtype=torch.int32, device=device)
    table = torch.empty((1 + most_tiles, 4), dtype=torch.int32, device=device)
    schedule(routed.ends, rows, TILE_ROWS, index[0], index[1], launch)
    prepare_rows(
        x, static_scale, data, scale, out, index, targets, table, routed,
        whole_rows=not blockwise, launch=launch,
    )  # fmt: skip
    scale_stride = 0 if b_scale.shape[1] == 1 and not blockwise else 1
    bias_dtype = None if bias is None else bias.dtype
    make = functools.partial(_kernel, n, k, blockwise, scale_stride, out.dtype)
    key = ("experts", x.get_device(), n, k, blockwise, scale_stride, out.dtype, bias_dtype)
    views = (
        (data, (rows, k), (k, 1)),
        (b, (experts, n, k), _strides(b)),
        (scale, (groups, columns), (columns, 1)),
    )
    rest = (out, b_scale, bias, targets, table, rows)
    programs = min(device_limits(device).multiprocessors, most_tiles * ceil_div(n, TILE_COLUMNS))
    with on_device_of(x):
        kernel_for(key, make)((programs, 1), views, rest, x.get_device())


def _strides(b: torch.Tensor) -> tuple[int, int, int]:
    """Strides of b that a tensor map takes: those of a single row or expert may be anything."""
    experts, n, k = b.shape
    of_row = b.stride(1) if n > 1 else k
    of_expert = b.stride(0) if experts > 1 else n * of_row
    return of_expert, of_row, 1


def _kernel(n: int, k: int, blockwise: bool, scale_stride: int, out_dtype: torch.dtype) -> Kernel:
    size = out_dtype.itemsize
    boxes: list[tuple[list[int], Any]] = [
        ([TILE_ROWS, 128], gl.NVMMASharedLayout(128, 8, 2)),
        ([1, TILE_COLUMNS, 128], gl.NVMMASharedLayout(128, 8, 3)),
        ([1, 128], gl.NVMMASharedLayout.get_default_for([1, 128], gl.float32)),
    ]
    constants = {
        "N": n,
        "K": k,
        "BLOCKWISE": blockwise,
        "SCALE_STRIDE": scale_stride,
        "VECTOR": math.gcd(n * size, _STORE) // size,
        "STAGES": STAGES,
        "GROUP_M": GROUP_M,
    }
    return Kernel(hopper_experts, boxes, constants, 4)
