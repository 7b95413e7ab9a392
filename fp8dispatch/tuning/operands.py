"""The tensors that one size is measured on, and the truth that outputs are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import quantize_activation
from fp8dispatch.quantization.weight import quantize
from fp8dispatch.recipe import Granularity, Recipe

_SEED = 0xF8
_STRIP_ELEMENTS = 1 << 24  # of the largest float64 matrix that judging makes: 128 MB


class Operands:
    """Tensors of one size on the device, and their truth in float64, a strip at a time."""

    def __init__(self, problem: LinearProblem, recipe: Recipe, device: torch.device) -> None:
        self.problem, self._recipe = problem, recipe
        self.block_size = recipe.block_size
        m, n, k = problem.m, problem.n, problem.k
        generator = torch.Generator(device).manual_seed(_SEED)

        def normal(rows: int) -> torch.Tensor:
            shape = (rows, k)
            return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)

        self.weight, self.scale = quantize(normal(n), recipe)
        self.x = normal(m)
        self._before = [tensor.clone() for tensor in self._inputs()]
        group = recipe.group_size(k)
        plain = quantize_activation(self.x, group, torch.float8_e4m3fn, None, use_kernels=False)
        scale = plain.scale.double().repeat_interleave(group, 1)[:, :k]
        self._wide_x = plain.data.float().double() * scale

    def _inputs(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.weight.view(torch.uint8), self.scale

    def unchanged(self) -> bool:
        return all(map(torch.equal, self._inputs(), self._before))

    def restore(self) -> None:
        for tensor, before in zip(self._inputs(), self._before, strict=True):
            tensor.copy_(before)

    def strips(self) -> Iterator[Strip]:
        m, n, k = self.problem.m, self.problem.n, self.problem.k
        step = max(1, _STRIP_ELEMENTS // max(m, k))
        for start in range(0, n, step):
            columns = slice(start, min(start + step, n))
            weight = self.weight[columns].float().double() * self._scale_of(columns)
            yield Strip(
                columns=columns,
                value=self._wide_x @ weight.t(),
                mass=self._wide_x.abs() @ weight.abs().t(),
                largest=self._wide_x.abs().amax(1, keepdim=True) * weight.abs().amax(1),
                x=self.x,
                problem=replace(self.problem, n=columns.stop - columns.start),
            )

    def _scale_of(self, rows: slice) -> torch.Tensor:
        """The weight's scales for some of its rows, as float64 that spreads to [rows, K]."""
        scale = self.scale.double()
        if self._recipe.block_size is None:
            whole = self._recipe.granularity is Granularity.TENSOR
            return scale.reshape(1, 1) if whole else scale[rows]
        block_n, block_k = self._recipe.block_size
        index = torch.arange(rows.start, rows.stop, device=scale.device) // block_n
        return scale[index].repeat_interleave(block_k, 1)[:, : self.problem.k]


@dataclass
class Strip:
    """Some columns of the truth, as `judge` wants it."""

    columns: slice
    value: torch.Tensor
    mass: torch.Tensor
    largest: torch.Tensor
    x: torch.Tensor
    problem: LinearProblem
    own_quantiser: bool = True  # `fp8_linear` lets each backend quantise as it does

    def unchanged(self) -> bool:
        """Asked, and the operands restored, before any strip is judged."""
        return True
