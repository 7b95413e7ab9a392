"""The canary's operands: made so that code which goes wrong where FP8 code does is seen to.

Scales differ in every block and lie between powers of two, one row of X is zero and one block of
the weight is far larger than the others. Memory that the output will get is filled with NaN first.
"""

from __future__ import annotations

import itertools
import math

import torch

from fp8dispatch.formats import cast, max_value
from fp8dispatch.problem import LinearProblem


def make_weight(
    problem: LinearProblem, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal codes, and scales apart from each other and from powers of two."""
    dtype = getattr(torch, problem.weight_dtype)
    limit = max_value(dtype)
    codes = normal((problem.n, problem.k), generator) * (limit / 5)
    scale = _between_powers(problem.recipe.scale_shape(problem.n, problem.k), generator)
    scale *= 0.1 / limit
    scale.view(-1)[scale.numel() // 2] *= 12  # one large block, row, or all
    return cast(codes, dtype), scale


def make_activations(problem: LinearProblem, generator: torch.Generator) -> torch.Tensor:
    """[M, K] bf16 of normal values, larger and smaller by token and by group of columns."""
    m, k = problem.m, problem.k
    group = min(problem.recipe.group_size(k), 128)
    x = normal((m, k), generator)
    x *= _between_powers((m, 1), generator)
    x *= _between_powers((m, -(-k // group)), generator).repeat_interleave(group, 1)[:, :k]
    if m > 8:
        x[3] = 0
        x[5, :group] = 0
        x[7, :group] *= 40
    return x.to(torch.bfloat16)


def _between_powers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Factors from 0.5 to 4, all different, each at least 15 % away from a power of two."""
    octave = torch.randint(-1, 2, shape, generator=generator, device="cpu")
    part = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return torch.exp2(octave + 0.2 + 0.6 * part).float()


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def spread(scale: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    """A grid of scales, one for each `rows` x `columns` block, as float64 [R, C]."""
    row = torch.arange(shape[0], device="cpu") // rows
    column = torch.arange(shape[1], device="cpu") // columns
    row, column = row.clamp(max=scale.shape[0] - 1), column.clamp(max=scale.shape[1] - 1)
    return scale.double()[row][:, column]


def poison(problem: LinearProblem, device: torch.device) -> None:
    """Leave NaN in freed memory of the output's size, so that what is not written shows."""
    rows = {-(-problem.m // multiple) * multiple for multiple in (1, 4, 64, 128)}
    dtypes = (getattr(torch, problem.out_dtype), torch.float32)
    held = [
        torch.full((m, problem.n), math.nan, dtype=dtype, device=device)
        for m, dtype, _ in itertools.product(rows, dtypes, range(2))
    ]
    held.clear()


def synchronize(device: torch.device) -> None:
    """Wait for the device, and raise what its kernels left behind."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
