"""Launches the Hopper kernels: from tensors to tensor maps, constants and a grid.

And our activation quantiser beside them, as cheaply.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from fp8dispatch.kernels.gluon_compat import gl
from fp8dispatch.kernels.gluon_launch import (
    Box,
    Kernel,
    Repeat,
    View,
    kernel_for,
    launch,
    plain_kernel,
)
from fp8dispatch.kernels.hopper_config import HopperConfig, choose_config
from fp8dispatch.kernels.hopper_decode import hopper_decode
from fp8dispatch.kernels.hopper_gemm import hopper_gemm
from fp8dispatch.kernels.hopper_split import hopper_gemm_split
from fp8dispatch.kernels.launch import Launch, ceil_div, device_limits, on_device_of
from fp8dispatch.kernels.quantize_activation import quantize_groups, quantize_rows

_MOST_PLANS = 8192
_BIAS, _OUT = 2, 3  # places among the arguments of a decode kernel behind its tensor maps
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


def repeat_quantize(
    x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, group: int
) -> Repeat | None:
    """A call of `quantize`, made before, that takes other addresses of `x`; None if impossible."""
    found: list[Repeat | None] = []

    def keep(
        function: Any,
        programs: int,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        warps: int,
    ) -> None:
        kernel = plain_kernel(function, arguments, constants, warps)
        found.append(kernel.repeat((programs, 1), (), arguments, x.get_device(), (0,)))

    _quantize(x, data, scale, group, keep)
    return found[0]


def quantize(x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, group: int) -> None:
    """Quantise activations with as cheap a launch; see `quantize_activation` for the arguments.

    One scale for each row where `scale` has one column, else for each row and `group` columns.
    """
    _quantize(x, data, scale, group, launch)


def _quantize(
    x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, group: int, how: Launch
) -> None:
    if scale.shape[1] == 1:
        quantize_rows(x, data, scale, how)
    else:
        quantize_groups(x, data, scale, group, how)


class Plan:
    """Everything about calls of one weight with one number of rows that does not change.

    Attributes:
        config: the kernel.
        elements, counters: the workspace that `run` wants; none where `elements` is 0.
        any_scales: the scales of the activations may have any strides, else `scales_fit` tells.
    """

    def __init__(
        self,
        m: int,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        bias_dtype: torch.dtype | None,
        out_dtype: torch.dtype,
        config: HopperConfig | None,
    ) -> None:
        n, k = b.shape
        limits = device_limits(b.device)
        masked = is_masked(n, out_dtype)
        if config is None:
            config = choose_config(m, n, k, masked, limits.multiprocessors)
        blockwise = b_scale.dim() == 2
        stride = 0 if b_scale.numel() == 1 else 1
        self.config = config
        self.any_scales = config.kind == "decode"
        self.elements, self.counters = config.workspace(m, n)
        self._groups = ceil_div(k, 128) if blockwise else 1
        self._flat = k % 128 != 0
        self._masked = masked
        self._device: int = b.get_device()
        tiles = config.tiles(m, n)
        if self.any_scales:
            make: Any = functools.partial(_decode_kernel, config, n, k, blockwise, stride)
            self._grid = (tiles, config.split)
        else:
            make = functools.partial(_gemm_kernel, config, n, k, blockwise, stride, out_dtype)
            split = config.kind == "split"
            self._grid = (tiles * config.split if split else min(tiles, limits.multiprocessors), 1)
        key = (self._device, config, n, k, blockwise, stride, out_dtype, bias_dtype)
        self._kernel = kernel_for(key, make)

    def run(
        self,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        workspace: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Multiply quantised activations by a quantised weight into `out`; nothing is checked.

        Args:
            a: ``[M, K]`` float8_e4m3fn, contiguous.
            a_scale: float32 ``[M, ceil(K / 128)]``, or ``[M, 1]`` in the row-wise recipe; strides
                as `any_scales` says.
            b: ``[N, K]`` float8_e4m3fn, rows at multiples of 16 bytes.
            b_scale: contiguous float32 ``[ceil(N / 128), ceil(K / 128)]``; ``[N]`` or ``[1]``
                (one-dimensional) in the row-wise recipe.
            bias: ``[N]`` contiguous, any float dtype, or None.
            out: ``[M, N]`` contiguous; every element is written.
            workspace: float32 and zeroed int32 memory as the plan wants it, of this stream alone.

        All tensors are on one device and aligned to 16 bytes; K is a multiple of 16.
        """
        views, rest = self._arguments(a, a_scale, b, b_scale, bias, out, workspace)
        with on_device_of(a):
            self._kernel(self._grid, views, rest, self._device)

    def repeat(
        self,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        workspace: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Repeat | None:
        """A call of a decode kernel, made before, that takes other addresses of output and bias.

        None where that is not possible. The caller keeps the memory of everything else alive.
        """
        if not self.any_scales:
            return None
        views, rest = self._arguments(a, a_scale, b, b_scale, bias, out, workspace)
        changing = (_OUT,) if bias is None else (_OUT, _BIAS)
        return self._kernel.repeat(self._grid, views, rest, self._device, changing)

    def _arguments(
        self,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        workspace: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[tuple[View, ...], tuple[Any, ...]]:
        m, k = a.shape
        n = b.shape[0]
        stride = b.stride(0) if n > 1 else k
        partials, counters = (out, out) if workspace is None else workspace
        views: tuple[View, ...]
        rest: tuple[Any, ...]
        if self.any_scales:
            if self._flat:
                views = ((b, (n, k), (stride, 1)), (a, (m, k), (k, 1)))
            else:
                blocks = k // 128
                views = (
                    (b, (blocks, n, 128), (128, stride, 1)),
                    (a, (blocks, m, 128), (128, k, 1)),
                )
            rest = (a_scale, b_scale, bias, out, partials, counters, m, *a_scale.stride())
        else:
            # The pitch of a single group is never used, but must be legal.
            pitch = a_scale.stride(1) if self._groups > 1 else (m + 3) // 4 * 4
            views = (
                (a, (m, k), (k, 1)),
                (b, (n, k), (stride, 1)),
                (a_scale, (self._groups, m), (pitch, 1)),
            )
            rest = (b_scale, bias, m)
            if self.config.kind == "split":
                rest = (b_scale, bias, partials, counters, m)
            if self._masked:
                rest = (out, *rest)
            else:
                views = (*views, (out, (m, n), (n, 1)))
        return views, rest


_plans: dict[Hashable, Plan] = {}


def plan_for(
    m: int,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: HopperConfig | None = None,
) -> Plan:
    """The kept plan of a call; the arguments are those of `Plan.run`.

    Args:
        m: rows of the activations.
        out_dtype: dtype of the output.
        config: the kernel; by default `choose_config` decides.
    """
    bias_dtype = None if bias is None else bias.dtype
    key = (m, b.shape, b_scale.shape, b.get_device(), bias_dtype, out_dtype, config)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = Plan(m, b, b_scale, bias_dtype, out_dtype, config)
    return plan


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
