"""The portable GEMM as a launch that is ready but for its output (`direct_launch`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8dispatch.kernels.direct_launch import Kernel, kernel_for, specialised
from fp8dispatch.kernels.launch import FP_FUSION
from fp8dispatch.kernels.repeat_launch import Repeat, View
from fp8dispatch.kernels.scaled_gemm import gemm_call, scaled_gemm_kernel

if TYPE_CHECKING:
    import torch

    from fp8dispatch.kernels.tile import Tile

_OUT = 5  # place of the output among the kernel's parameters


def repeat_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    block_size: tuple[int, int] | None,
    tile_rows: int | None = None,
    tile: Tile | None = None,
) -> Repeat | None:
    """A call of `scaled_gemm` that takes another output of the same form.

    Returns:
        None where launches are not direct. The caller keeps the memory of everything else alive.
    """
    call = gemm_call(a, a_scale, b, b_scale, bias, out, block_size, None, tile_rows, tile)
    views: tuple[View, ...] = ()
    rest: tuple[Any, ...] = (*call.operands, *call.rest)
    if call.boxes:
        views = tuple((one, tuple(one.shape), one.stride()) for one in call.operands)
        rest = call.rest
    config, device = call.config, a.get_device()
    key = (
        "scaled_gemm",
        device,
        a.dtype,
        b.dtype,
        config,
        *call.constants.values(),
        *specialised(scaled_gemm_kernel, rest, len(views)),
    )

    def make() -> Kernel:
        boxes = tuple((box,) for box in call.boxes)
        return Kernel(
            scaled_gemm_kernel,
            boxes,
            call.constants,
            config.num_warps,
            fusion=FP_FUSION,
            stages=config.num_stages,
        )

    return kernel_for(key, make).repeat((call.programs, 1), views, rest, device, _OUT)
