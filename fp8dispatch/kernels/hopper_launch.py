"""Launches the Hopper kernels: from tensors to tensor maps, constants and a grid.

With the quantiser that is launched as cheaply, this is all that the backend `gluon` calls.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from fp8dispatch.kernels.gluon_compat import gl
from fp8dispatch.kernels.gluon_launch import Box, Kernel, Repeat, View, kernel_for
from fp8dispatch.kernels.hopper_config import HopperConfig, choose_config
from fp8dispatch.kernels.hopper_decode import hopper_decode
from fp8dispatch.kernels.hopper_gemm import hopper_gemm
from fp8dispatch.kernels.hopper_split import hopper_gemm_split
from fp8dispatch.kernels.launch import ceil_div, device_limits, on_device_of
from fp8dispatch.kernels.ready_quantize import quantize as quantize
from fp8dispatch.kernels.ready_quantize import repeat_quantize as repeat_quantize

PROGRAMMATIC = True
"""The decode kernel starts while our quantiser runs; launches that are not direct are ordinary in
any case. `tests/gpu/test_programmatic.py` holds that no earlier write is overtaken."""

PROGRAMMATIC_IN_GRAPHS = True
"""And also where the two launches are captured into a CUDA graph (CUDA 12.3 or later): the same."""

_MOST_PLANS = 8192
_BUFFERS = 2  # pieces of output that a consumer may have on their way
_DTYPES = {
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.float8_e5m2: gl.float8e5,
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


def may_overlap() -> bool:
    """Whether the next launch on the current stream may start while the one in front runs."""
    return PROGRAMMATIC_IN_GRAPHS or not torch.cuda.is_current_stream_capturing()


class Plan:
    """Everything about calls of one weight with one number of rows that does not change.

    Attributes:
        config: the kernel.
        elements, counters: the workspace that `run` wants; none where `elements` is 0.
        any_scales: the scales of the activations may have any strides, else `scales_fit` tells.
        programmatic: right behind our quantiser the kernel may start while that still runs.
    """

    def __init__(
        self,
        m: int,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        bias_dtype: torch.dtype | None,
        out_dtype: torch.dtype,
        block_size: tuple[int, int] | None,
        config: HopperConfig | None,
    ) -> None:
        n, k = b.shape
        limits = device_limits(b.device)
        masked = is_masked(n, out_dtype)
        if config is None:
            config = choose_config(m, n, k, masked, limits.multiprocessors)
        scales = _Scales.of(n, k, block_size, one=b_scale.numel() == 1)
        self.config = config
        self.any_scales = config.kind == "decode"
        self.programmatic = self.any_scales and PROGRAMMATIC
        self.elements, self.counters = config.workspace(m, n)
        self._groups = 1 if block_size is None else ceil_div(k, block_size[1])
        self._flat = k % 128 != 0
        self._masked = masked
        self._device: int = b.get_device()
        tiles = config.tiles(m, n)
        if self.any_scales:
            make: Any = functools.partial(
                _decode_kernel, config, n, k, b.dtype, scales, self.programmatic
            )
            self._grid = (tiles, config.split)
        else:
            make = functools.partial(_gemm_kernel, config, n, k, b.dtype, scales, out_dtype)
            split = config.kind == "split"
            self._grid = (tiles * config.split if split else min(tiles, limits.multiprocessors), 1)
        key = (
            self._device, config, n, k, b.dtype, scales, out_dtype, bias_dtype, self.programmatic
        )  # fmt: skip
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
        *,
        behind_quantizer: bool = False,
    ) -> None:
        """Multiply quantised activations by a quantised weight into `out`; nothing is checked.

        Args:
            a: ``[M, K]`` float8_e4m3fn, contiguous.
            a_scale: float32 ``[M, ceil(K / block_k)]``, or ``[M, 1]`` in the row-wise recipe;
                strides as `any_scales` says.
            b: ``[N, K]`` float8_e4m3fn or float8_e5m2, rows at multiples of 16 bytes.
            b_scale: contiguous float32 ``[ceil(N / block_n), ceil(K / block_k)]``; ``[N]`` or
                ``[1]`` (one-dimensional) in the row-wise recipe.
            bias: ``[N]`` contiguous, any float dtype, or None.
            out: ``[M, N]`` contiguous; every element is written.
            workspace: float32 and zeroed int32 memory as the plan wants it, of this stream alone.
            behind_quantizer: the launch right in front is our quantiser's, which made `a`, and lets
                this kernel start early; only where the plan is `programmatic`.

        All tensors are on one device and aligned to 16 bytes; K is a multiple of 16.
        """
        views, rest = self._arguments(a, a_scale, b, b_scale, bias, out, workspace)
        with on_device_of(a):
            self._kernel(self._grid, views, rest, self._device, programmatic=behind_quantizer)

    def repeat(
        self,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        workspace: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        behind_quantizer: bool = False,
    ) -> Repeat | None:
        """A call of `run` that takes another output; None where launches are not direct.

        The caller keeps the memory of everything else alive.
        """
        views, rest = self._arguments(a, a_scale, b, b_scale, bias, out, workspace)
        place = next(
            index for index, one in enumerate((*(view[0] for view in views), *rest)) if one is out
        )
        return self._kernel.repeat(
            self._grid, views, rest, self._device, place, programmatic=behind_quantizer
        )

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
            # One scale for all of K is the same one in every block.
            stride_m, stride_k = a_scale.stride(0), a_scale.stride(1) if self._groups > 1 else 0
            rest = (a_scale, b_scale, bias, out, partials, counters, m, stride_m, stride_k)
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
    block_size: tuple[int, int] | None,
    config: HopperConfig | None = None,
) -> Plan:
    """The kept plan of a call; the arguments are those of `Plan.run`.

    Args:
        m: rows of the activations.
        out_dtype: dtype of the output.
        block_size: (block_n, block_k) of `b_scale`, multiples of 128, or at least N or K; None in
            the row-wise recipe.
        config: the kernel; by default `choose_config` decides.
    """
    bias_dtype = None if bias is None else bias.dtype
    key = (
        m, b.shape, b.dtype, b_scale.shape, b.get_device(), bias_dtype, out_dtype, block_size,
        config, PROGRAMMATIC,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = Plan(m, b, b_scale, bias_dtype, out_dtype, block_size, config)
    return plan


def _box(block: list[int], dtype: torch.dtype) -> Box:
    return block, gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])


class _Scales(NamedTuple):
    """What the kernels are compiled for of the weight's scales, in the order of their parameters.

    Attributes:
        blockwise: a scale for each block, else for each row.
        block_n, block_k: of a block, multiples of 128.
        stride: of the scales of rows: 0 where one serves them all.
    """

    blockwise: bool
    block_n: int
    block_k: int
    stride: int

    @classmethod
    def of(cls, n: int, k: int, block_size: tuple[int, int] | None, *, one: bool) -> _Scales:
        """Blocks that reach over all of N or K are rounded up: they are the only ones there."""
        if block_size is None:
            return cls(False, 128, 128, 0 if one else 1)
        block_n, block_k = (
            size if size < whole else ceil_div(size, 128) * 128
            for size, whole in zip(block_size, (n, k), strict=True)
        )
        return cls(True, block_n, block_k, 0 if one else 1)

    def constants(self) -> dict[str, Any]:
        names = ("BLOCKWISE", "SCALE_N", "SCALE_K", "SCALE_STRIDE")
        return dict(zip(names, self, strict=True))


def _gemm_kernel(
    config: HopperConfig,
    n: int,
    k: int,
    dtype: torch.dtype,
    scales: _Scales,
    out_dtype: torch.dtype,
) -> Kernel:
    masked = is_masked(n, out_dtype)
    boxes = [
        _box([128, 128], torch.float8_e4m3fn),
        _box([config.block_n, 128], dtype),
        _box([1, 128], torch.float32),
    ]
    if not masked:
        boxes.append(_box([64, 128 // out_dtype.itemsize], out_dtype))
    constants = {"N": n, "K": k, **scales.constants(), "MASKED": masked}
    if config.kind == "split":
        constants |= {"BLOCK_N": config.block_n, "STAGES": config.stages, "SPLIT": config.split}
        constants |= {"BUFFERS": _BUFFERS, "UNROLL": config.unroll}
        return Kernel(hopper_gemm_split, boxes, constants, 4)
    constants |= {"BLOCK_N": config.block_n, "STAGES": config.stages, "GROUP_M": config.group_m}
    constants |= {"EVEN": config.even, "BUFFERS": _BUFFERS, "UNROLL": config.unroll}
    return Kernel(hopper_gemm, boxes, constants, 4)


def _decode_kernel(
    config: HopperConfig, n: int, k: int, dtype: torch.dtype, scales: _Scales, programmatic: bool
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
        **scales.constants(),
        "FLAT": flat,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SPLIT": config.split,
        "CHUNK": config.chunk,
        "STAGES": config.stages,
        "PROGRAMMATIC": programmatic,
    }
    return Kernel(hopper_decode, boxes, constants, config.warps)
