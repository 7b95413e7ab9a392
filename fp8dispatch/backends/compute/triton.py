"""The computation of `fp8dispatch.backends.triton`."""

from __future__ import annotations

import functools

import torch

from fp8dispatch.backends.compute.settled import Ready, Settled
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.triton import Triton
from fp8dispatch.kernels.float8 import native_float8
from fp8dispatch.kernels.gemm_config import choose_config
from fp8dispatch.kernels.gemm_tiles import candidates
from fp8dispatch.kernels.launch import device_limits
from fp8dispatch.kernels.scaled_gemm import scaled_gemm
from fp8dispatch.kernels.tile import Tile
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.workspace import quantized_activations

PINNED_ROWS = 64
"""M whose tile serves every M of a batch-invariant call: short enough for decoding, and tall enough
for a warpgroup's instruction."""

DIRECT_CAPABILITIES: tuple[tuple[int, int], ...] = ((9, 0),)
"""Where launches of these kernels past Triton's own have been seen to give the same bits."""


def matmul(
    self: Triton,
    x: QuantizedActivation,
    weight: Weight,
    bias: torch.Tensor | None,
    problem: LinearProblem,
) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, problem.out_dtype)
    out = torch.empty((problem.m, problem.n), dtype=dtype, device=x.data.device)
    x_scale, weight_scale = _scales(x.scale, weight, problem)
    scaled_gemm(
        x.data,
        x_scale,
        weight.data,
        weight_scale,
        bias,
        out,
        weight.recipe.block_size,
        tile_rows=_tile_rows(problem),
        tile=problem.tile,
    )
    return out


def tiles(self: Triton, problem: LinearProblem, device: torch.device) -> tuple[Tile, ...]:
    names = (problem.weight_dtype, problem.activation_dtype)
    upcast = not all(native_float8(getattr(torch, name), device) for name in names)
    block_size, limits = problem.recipe.block_size, device_limits(device)
    chosen = choose_config(
        problem.m,
        problem.n,
        block_size=block_size,
        upcast=upcast,
        descriptors=False,  # of no concern to the tile
        limits=limits,
    )
    return candidates(chosen, block_size, upcast, limits)


def settled(
    self: Triton,
    weight: Weight,
    activation_scale: torch.Tensor | None,
    problem: LinearProblem,
    device: torch.device,
) -> Settled | None:
    if (
        device.type != "cuda"
        or device_limits(device).capability not in DIRECT_CAPABILITIES
        or problem.activation_dtype != "float8_e4m3fn"
        or problem.k % 16  # what `quantized_activations` has memory for
    ):
        return None
    make = functools.partial(_make_ready, problem)
    return Settled(self, weight, activation_scale, problem, device, make)


def _make_ready(
    problem: LinearProblem,
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
) -> Ready | None:
    """The launches of a call that `linear` has just made, on the same stream."""
    # Imported here because Triton before 3.4 has no tensor maps.
    from fp8dispatch.kernels.ready_gemm import repeat_gemm
    from fp8dispatch.kernels.ready_quantize import repeat_quantize

    m, k, recipe = problem.m, problem.k, weight.recipe
    groups = 1 if recipe.block_size is None else weight.scale.shape[1]
    data, scale = quantized_activations(x.device, m, k, groups)
    static = activation_scale is not None
    if activation_scale is not None:
        scale = activation_scale.reshape(1, 1)
    out = torch.empty((m, problem.n), dtype=getattr(torch, problem.out_dtype), device=x.device)
    x_scale, weight_scale = _scales(scale, weight, problem)
    quantize = repeat_quantize(x, data, scale, recipe.group_size(k), static=static)
    multiply = repeat_gemm(
        data,
        x_scale,
        weight.data,
        weight_scale,
        bias,
        out,
        recipe.block_size,
        _tile_rows(problem),
        problem.tile,
    )
    if quantize is None or multiply is None:
        return None
    return Ready(quantize, multiply, (data, scale, activation_scale))


def _scales(
    scale: torch.Tensor, weight: Weight, problem: LinearProblem
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of both operands as the kernel takes them: views, never copies."""
    m, n = problem.m, problem.n
    if weight.recipe.block_size is None:
        return scale.expand(m, 1), weight.scale.reshape(-1, 1).expand(n, 1)
    return scale.expand(m, weight.scale.shape[1]), weight.scale


def _tile_rows(problem: LinearProblem) -> int | None:
    return PINNED_ROWS if problem.batch_invariant else None
