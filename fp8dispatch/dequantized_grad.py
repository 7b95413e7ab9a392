"""dX [M, K] = dY [M, N] @ W [N, K] through the dequantised weight, in one of three ways.

* `gluon`: one kernel for Hopper that dequantises W in registers, for the calls that it takes;
* `triton`: the portable kernel, which dequantises W tile by tile;
* `strips`: strips of W dequantised into memory, and `torch.mm` over each.

All three give the numbers of `dequantize` followed by a matmul that sums in fp32. Which is first is
what an H200 measured (bench/results/h200-gradient.json): few rows cost the bytes of the weight, of
which a kernel reads half or a quarter; with many, cuBLAS makes up for a pass over the weight.
"""

from __future__ import annotations

import functools
import logging
from enum import Enum

import torch

from fp8dispatch import decide, registry
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.formats import dtype_name
from fp8dispatch.probes.device import describe, runs_kernels
from fp8dispatch.quantization.weight import block_of, dequantize_strip
from fp8dispatch.recipe import BLOCK_128, Recipe, ceil_div

_log = logging.getLogger("fp8dispatch")

STRIP_ELEMENTS = 1 << 25
"""Most elements of the weight that exist dequantised at a time (64 MiB in bf16)."""

KERNEL_CAPABILITIES: tuple[tuple[int, int], ...] = ((9, 0),)
"""Where our kernels have been seen to compute right numbers; a gradient has no canary."""

LARGE_WEIGHT = 28 << 20
"""Elements from which on a weight is large: with some hundred rows, kernels win on those."""


class Way(str, Enum):
    """How dX goes through the dequantised weight."""

    GLUON = "gluon"
    TRITON = "triton"
    STRIPS = "strips"


_SAID = {
    Way.GLUON: "a Gluon kernel",
    Way.TRITON: "a Triton kernel",
    Way.STRIPS: "strips and torch.mm",
}


def ways(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> tuple[Way, ...]:
    """What is tried for a dY [m, n] of this dtype and a weight [n, k], the fastest first.

    An fp32 gradient stays with torch, which multiplies it as ``float32_matmul_precision`` says.
    """
    if (
        dtype == torch.float32
        or device.type != "cuda"
        or torch.cuda.get_device_capability(device) not in KERNEL_CAPABILITIES
        or not runs_kernels(device)
    ):
        return (Way.STRIPS,)
    large = n * k >= LARGE_WEIGHT
    found: list[Way] = []
    if (m <= 128 or (m <= 2048 and large)) and runs_gluon(device):
        found.append(Way.GLUON)
    if m <= 64 and large and k >= 4096:  # it does not divide N, so a small K leaves SMs idle
        found.append(Way.TRITON)
    return (*found, Way.STRIPS)


@functools.cache
def runs_gluon(device: torch.device) -> bool:
    """The kernel for Hopper may run: nothing refuses it, and with this Triton it has been seen to.

    A backend of another Triton is first run in a child and judged by a canary; a gradient is not.
    """
    backend, machine = registry.load("gluon"), describe(device)
    refused = backend.refuse_machine(machine) or backend.loadable(BLOCK_128)
    return not refused and backend.is_verified(machine)


def sentence(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> str:
    """How dX is computed for a dY [m, n] of this dtype and a weight [n, k]."""
    first, *others = (_SAID[way] for way in ways(m, n, k, device, dtype))
    text = f"through the dequantised weight in {dtype_name(dtype)}, by {first}"
    return f"{text}, or {others[0]} where strides or scales do not suit that" if others else text


def grad_input(
    grad: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    recipe: Recipe,
    way: Way | None = None,
) -> torch.Tensor:
    """dX [M, K] in dY's dtype, summed in fp32.

    Args:
        grad: [M, N] bf16, fp16 or fp32.
        data, scale: [N, K] FP8 and the fp32 multipliers of `recipe`.
        way: this one or none; None tries `ways`.

    Raises:
        BackendUnavailableError: `way` does not take the call.
    """
    n, k = data.shape
    out = torch.empty((grad.shape[0], k), dtype=grad.dtype, device=grad.device)
    tried = (way,) if way else ways(grad.shape[0], n, k, grad.device, grad.dtype)
    rows, width = block_of(recipe, n, k)
    grid = scale.reshape(ceil_div(n, rows), ceil_div(k, width))
    for one in tried:
        if one is Way.GLUON:
            refusal = _gluon(grad, data, grid, out, (rows, width))
            if refusal is None:
                return out
            if way is not None:
                raise refusal
        if one is Way.TRITON:
            # Imported here because it imports Triton, which is not a requirement of the package.
            from fp8dispatch.kernels import grad_input as kernel

            kernel.grad_input(grad, data, grid, out, (rows, width))
            return out
    _strips(grad, data, scale, recipe, out)
    return out


def _gluon(
    grad: torch.Tensor,
    data: torch.Tensor,
    grid: torch.Tensor,
    out: torch.Tensor,
    block_size: tuple[int, int],
) -> BackendUnavailableError | None:
    """Compute dX into `out` with the kernel for Hopper, or say why it does not."""
    if not runs_gluon(grad.device):
        return BackendUnavailableError(
            f"the Gluon kernel for dX needs a Hopper GPU and a Triton that it has run with before, "
            f"found {describe(grad.device)}; take another way"
        )
    # Imported here because it imports Triton, which is not a requirement of the package.
    from fp8dispatch.kernels import hopper_grad_launch as kernel

    if not kernel.takes(grad, data, grid, out, block_size):
        return BackendUnavailableError(
            f"the Gluon kernel for dX needs 16-bit rows aligned to 16 bytes, e4m3fn weights and "
            f"blocks of multiples of 64x128, found dY {tuple(grad.shape)} of {grad.dtype} and W "
            f"{tuple(data.shape)} of {data.dtype} with blocks {block_size}; take another way"
        )
    try:
        kernel.grad_input(grad, data, grid, out, block_size)
    except BackendUnavailableError as refusal:
        # The first call of its kind inside of a captured graph, where nothing may be compiled;
        # nothing was launched yet, and the next way is as right.
        decide.counters.cold_in_capture += 1
        _log.warning(
            "a gradient was captured into a CUDA graph before its kernel was ever run, and takes "
            "another way; run a backward pass of that size once before capturing"
        )
        return refusal
    return None


def _strips(
    grad: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, recipe: Recipe, out: torch.Tensor
) -> None:
    """Each strip of columns is complete in itself, so nothing is summed across strips."""
    n, k = data.shape
    width = recipe.block_size[1] if recipe.block_size is not None else 128
    strip = max(STRIP_ELEMENTS // n // width, 1) * width
    for start in range(0, k, strip):
        columns = slice(start, min(start + strip, k))
        piece = dequantize_strip(data, scale, recipe, grad.dtype, columns)
        torch.mm(grad, piece, out=out[:, columns])
