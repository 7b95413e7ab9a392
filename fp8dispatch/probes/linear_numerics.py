"""The canary of linears: does a backend compute the right numbers for them on this device?

M is 132 and 130 (not a multiple of 4), N = 272 and K = 640 are ragged for tiles and for padding to
four blocks. A backend that takes other kernels at other sizes names a size for each of those
(`canary_sizes`), and is called there too. The truth is computed on the CPU in float64 from the same
operands: quantised, or for a backend that leaves activations alone as they are. Operands and bounds
are those of `known_operands` and `judgement`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fp8dispatch.backends.contract import Backend, Weight
from fp8dispatch.errors import Refusal
from fp8dispatch.formats import activation_float8, dtype_name, max_value
from fp8dispatch.machine import Machine
from fp8dispatch.probes.device import describe
from fp8dispatch.probes.judgement import CanaryResult, judge
from fp8dispatch.probes.known_operands import (
    make_activations,
    make_weight,
    normal,
    poison,
    spread,
    synchronize,
)
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation
from fp8dispatch.recipe import Granularity, Recipe

# The wanted sizes first; the others stand in where a backend refuses them, nearest first.
_ROWS = (132, 130, 128, 64, 16, 8, 4, 1)
_COLUMNS = (272, 256, 384, 512, 1024)
_DEPTHS = (640, 1280, 512, 1024)
_SEED = 0xF8


@dataclass(frozen=True)
class _Case:
    """One call: its problem, and how the operands come."""

    problem: LinearProblem
    quantized: bool
    bias_dtype: str | None
    seed: int

    def __str__(self) -> str:
        return f"{'matmul' if self.quantized else 'linear'} with {self.problem}"


class _Operands:
    """The tensors of one case, on the CPU and on the device, and the truth in float64."""

    def __init__(
        self, case: _Case, device: torch.device, rows_per_scale: int = 1, *, quantizes: bool = True
    ) -> None:
        problem, self.case, self._quantizes = case.problem, case, quantizes
        generator = torch.Generator(device="cpu").manual_seed(case.seed)
        recipe, k = problem.recipe, problem.k
        group = recipe.group_size(k)
        data, scale = make_weight(problem, generator)
        x = make_activations(problem, generator)
        dtype = getattr(torch, problem.activation_dtype)
        static = None
        if problem.static_activation:
            static = (x.float().abs().amax() / max_value(dtype)).reshape(1)
        plain = quantize_activation(
            x, group, dtype, static, use_kernels=False, rows_per_scale=rows_per_scale
        )
        bias = None
        if case.bias_dtype is not None:
            bias = normal((problem.n,), generator).to(getattr(torch, case.bias_dtype))

        wide_x = plain.data.float().double() * spread(
            plain.scale, rows_per_scale, group, plain.data.shape
        )
        if not quantizes and not case.quantized:
            wide_x = x.double()
        rows = 1 if recipe.granularity is not Granularity.TENSOR else problem.n
        rows = rows if recipe.block_size is None else recipe.block_size[0]
        wide_weight = data.float().double() * spread(
            scale.reshape(-1, scale.shape[-1]), rows, group, data.shape
        )
        self.value = wide_x @ wide_weight.t()
        self.mass = wide_x.abs() @ wide_weight.abs().t()
        self.largest = wide_x.abs().amax(1, keepdim=True) * wide_weight.abs().amax(1)
        if bias is not None:
            self.value += bias.double()
            self.mass += bias.double().abs()

        source = scale.to(device)
        self.weight = Weight(data.to(device), source.clone(), recipe, scale_source=source)
        self.bias = None if bias is None else bias.to(device)
        self.static = None if static is None else static.to(device)
        self.x = x.to(device)
        # Any strides of the scale are allowed: token by token here, group by group in `linear`.
        x_scale = plain.scale.contiguous() if case.problem.m % 4 else plain.scale
        moved = torch.empty_strided(
            x_scale.shape, x_scale.stride(), dtype=torch.float32, device=device
        ).copy_(x_scale)
        self.quantized = QuantizedActivation(plain.data.to(device), moved)
        self.before = [tensor.clone() for tensor in self._inputs()]

    def _inputs(self) -> list[torch.Tensor]:
        tensors = [self.x, self.quantized.data, self.quantized.scale, self.weight.data]
        tensors += [self.weight.scale, self.weight.scale_source]
        tensors += [tensor for tensor in (self.bias, self.static) if tensor is not None]
        return [tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor for tensor in tensors]

    @property
    def problem(self) -> LinearProblem:
        return self.case.problem

    @property
    def own_quantiser(self) -> bool:
        return self._quantizes and not self.case.quantized

    def unchanged(self) -> bool:
        return all(map(torch.equal, self._inputs(), self.before))

    def run(self, backend: Backend) -> torch.Tensor:
        problem = self.case.problem
        poison(problem, self.x.device)
        if self.case.quantized:
            return backend.matmul(self.quantized, self.weight, self.bias, problem)
        return backend.linear(self.x, self.weight, self.bias, self.static, problem)


def run_linear_canary(backend: Backend, device: torch.device, recipe: Recipe) -> CanaryResult:
    """`numerics.run_canary` for a backend of linears.

    Raises:
        Exception: whatever the backend raises; the caller knows what that means.
    """
    machine = describe(device)
    cases, refusals = _applicable(backend, recipe, machine)
    if not cases:
        sentences = "; ".join(str(refusal) for refusal in refusals)
        return CanaryResult(False, f"not applicable: {backend.name} {sentences}", 0.0, False)
    worst = 0.0
    with torch.autocast(device.type, enabled=False):
        for case in cases:
            operands = _Operands(
                case, device, backend.rows_per_scale, quantizes=backend.quantizes_activations
            )
            out = operands.run(backend)
            synchronize(device)
            share, problem = judge(out, operands)
            worst = max(worst, share)
            if problem is not None:
                return CanaryResult(False, f"{case}: {problem}", worst)
    count = len(cases)
    return CanaryResult(True, f"right in {count} calls, {worst:.0%} of the bound used", worst)


def _applicable(
    backend: Backend, recipe: Recipe, machine: Machine
) -> tuple[list[_Case], tuple[Refusal, ...]]:
    """The cases that the backend takes, or else why it refuses the first."""
    refused = backend.refuse_machine(machine)
    if refused:
        return [], refused
    dtypes = sorted(backend.weight_dtypes, key=lambda name: (name != "float8_e4m3fn", name))
    weight_dtype = dtypes[0]
    wanted = LinearProblem(
        _ROWS[0],
        _COLUMNS[0],
        _DEPTHS[0],
        recipe,
        weight_dtype,
        dtype_name(activation_float8(getattr(torch, weight_dtype))),
        "bfloat16" if "bfloat16" in backend.out_dtypes else min(backend.out_dtypes),
        accuracy=Accuracy.EXACT if Accuracy.EXACT in backend.accuracies else Accuracy.FAST,
    )
    for n, k in itertools.product(_COLUMNS, _DEPTHS):
        shaped = replace(wanted, n=n, k=k)
        taken = [m for m in _ROWS if not backend.refuse_problem(replace(shaped, m=m), machine)]
        if taken:
            rows = [m for m in _ROWS[:2] if m in taken] or taken[:1]
            every = [
                case
                for case in (*_cases(backend, shaped, rows), *_cases_of_kernels(backend, shaped))
                if not backend.refuse_problem(case.problem, machine)
            ]
            return every, ()
    return [], backend.refuse_problem(wanted, machine)


def _cases(backend: Backend, shaped: LinearProblem, rows: list[int]) -> Iterator[_Case]:
    """All sizes with and without bias on both entries, then each other way to call it once."""
    seeds = itertools.count(_SEED)  # other data in each call: an old result is a wrong one

    def case(problem: LinearProblem, bias_dtype: str | None, *, quantized: bool) -> _Case:
        described = replace(problem, has_bias=bias_dtype is not None)
        return _Case(described, quantized, bias_dtype, next(seeds))

    for m, quantized in itertools.product(rows, (True, False)):
        problem = replace(shaped, m=m)
        yield case(problem, problem.out_dtype if m % 4 == 0 else "float32", quantized=quantized)
        yield case(problem, None, quantized=quantized)
    last = replace(shaped, m=rows[-1])
    for out_dtype in sorted(backend.out_dtypes - {shaped.out_dtype}):
        other = replace(last, out_dtype=out_dtype)
        yield case(other, out_dtype, quantized=False)
        yield case(other, None, quantized=True)
    yield case(replace(last, static_activation=True), last.out_dtype, quantized=False)
    for weight_dtype in sorted(backend.weight_dtypes - {shaped.weight_dtype}):
        met = dtype_name(activation_float8(getattr(torch, weight_dtype)))
        if met == shaped.activation_dtype:  # a product of two formats is another instruction
            yield case(replace(last, weight_dtype=weight_dtype), None, quantized=True)
    if Accuracy.FAST in backend.accuracies and shaped.accuracy is Accuracy.EXACT:
        yield case(replace(last, accuracy=Accuracy.FAST), None, quantized=True)


def _cases_of_kernels(backend: Backend, shaped: LinearProblem) -> Iterator[_Case]:
    """Both entries at each size that the backend names, with the bias that costs no new kernel."""
    seeds = itertools.count(2 * _SEED)
    for (m, n, k), quantized in itertools.product(backend.canary_sizes, (True, False)):
        problem = replace(shaped, m=m, n=n, k=k, has_bias=True)
        yield _Case(problem, quantized, problem.out_dtype, next(seeds))
