"""The canary: does a backend compute the right numbers on this device?

A backend runs a few small calls that are made to fail where such code goes wrong: M is 132 and 130
(not a multiple of 4), N = 272 and K = 640 are ragged for tiles and for padding to four blocks,
scales differ in every block and lie between powers of two, one row of X is zero and one block of
the weight is far larger than the others. Memory that the output will get is filled with NaN first.
The truth is computed on the CPU in float64 from the same operands: quantised, or for a backend that
leaves activations alone as they are.

Each output is judged by element and by row. ``mass`` is the sum of the absolute products plus
|bias|, so a zeroed or scrambled row cannot hide behind large neighbours:

    |out - truth| <= roundoff(out dtype) * |truth| + accumulation * mass      for each element
    SQNR >= floor                                                             for each row
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fp8dispatch.backends.contract import Backend, Capability, Weight
from fp8dispatch.errors import Refusal
from fp8dispatch.formats import activation_float8, cast, dtype_name, max_value
from fp8dispatch.machine import Machine
from fp8dispatch.probes.device import describe
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation
from fp8dispatch.recipe import Granularity, Recipe

# The wanted sizes first; the others stand in where a backend refuses them, nearest first.
_ROWS = (132, 130, 128, 64, 16, 8, 4, 1)
_COLUMNS = (272, 256, 384, 512, 1024)
_DEPTHS = (640, 1280, 512, 1024)
_SEED = 0xF8

ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Unit roundoff of the output dtypes: half the distance of two neighbours, relative."""

SUBNORMAL = {"bfloat16": 0.0, "float16": 2.0**-25, "float32": 0.0}
"""Half of fp16's absolute step below its normal numbers; outputs do not come near the others'."""

ACCUMULATION = {Accuracy.EXACT: 2.0**-12, Accuracy.FAST: 2.0**-9}
"""Error of the sum over K, relative to ``mass``.

Hopper's tensor core aligns the products of one instruction to the largest and keeps about 14
bits. ``EXACT`` promotes chains of at most 128 products into fp32, so a chain's error is all there
is, with two bits for the instructions of a chain. ``FAST`` carries the 14 bits over all of K,
which was measured up to K = 16384 to stay within 2**-9.
"""

FLOORS = {
    Accuracy.EXACT: {"bfloat16": 45.0, "float16": 50.0, "float32": 50.0},
    Accuracy.FAST: {"bfloat16": 35.0, "float16": 35.0, "float32": 35.0},
}
"""SQNR of a row in decibels. Rounding to bf16 gives 48 at the very least (every element off by
2**-8), accumulation within the bound a few decibels less where one column of a row outweighs the
others; a scale that is off by the 15 % of `_between_powers` in one of five groups gives 23."""

QUANTISER = 2.0**-3
"""Room for a quantiser of the backend's own, relative to the largest product of the row and column.

One that multiplies by a rounded reciprocal instead of dividing puts a value that lies on a
rounding boundary one code further, which is a step of at most 2**-3 of that value. Among these
operands such values are rarer than one in a row.
"""

QUANTISER_FLOOR = 33.0
"""SQNR that a row keeps when its largest value moved by one code; wrong groups give about 28."""


@dataclass(frozen=True)
class CanaryResult:
    """What the canary found.

    Attributes:
        right: every call gave the right numbers.
        reason: a sentence: what was wrong and where, or how much of the bound was used.
        worst: largest error as a share of its bound; infinite where the output is not finite or
            has the wrong form.
        applicable: False where the backend refuses every call of the canary; nothing was computed
            then, and `right` says nothing.
    """

    right: bool
    reason: str
    worst: float
    applicable: bool = True


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


@torch.no_grad()
def run_canary(backend: Capability, device: torch.device, recipe: Recipe) -> CanaryResult:
    """Run a backend on known operands and compare its numbers with the truth.

    Waits for the device. The global random number generators, autocast and the backend's
    operands are left as they are.

    Args:
        backend: where it refuses the machine or every call, the result is not applicable.
        device: where the operands lie; it is not made the current device.
        recipe: the recipe to vouch for.

    Raises:
        Exception: whatever the backend raises; the caller knows what that means.
    """
    if not isinstance(backend, Backend):
        from fp8dispatch.probes.experts_numerics import run_experts_canary

        return run_experts_canary(backend, device, recipe)
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
                for case in _cases(backend, shaped, rows)
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
    if Accuracy.FAST in backend.accuracies and shaped.accuracy is Accuracy.EXACT:
        yield case(replace(last, accuracy=Accuracy.FAST), None, quantized=True)


class Judged(Protocol):
    """A call whose output is judged: see `_Operands` for what each part is."""

    value: torch.Tensor
    mass: torch.Tensor
    largest: torch.Tensor
    x: torch.Tensor

    @property
    def problem(self) -> LinearProblem: ...

    @property
    def own_quantiser(self) -> bool: ...

    def unchanged(self) -> bool: ...


def judge(out: object, operands: Judged) -> tuple[float, str | None]:
    """Share of the bound that the output uses, and what is wrong with it."""
    problem = operands.problem
    if not isinstance(out, torch.Tensor):
        return math.inf, f"returned {type(out).__name__} instead of a tensor"
    form = (tuple(out.shape), dtype_name(out.dtype), out.device)
    if form != ((problem.m, problem.n), problem.out_dtype, operands.x.device):
        return math.inf, f"returned {list(form[0])} {form[1]} on {form[2]}"
    got = out.detach().to(operands.value.device).double()
    finite = torch.isfinite(got)
    if not bool(finite.all()):
        row, column = (int(index) for index in (~finite).nonzero()[0])
        missing = int((~finite).sum())
        return math.inf, f"{missing} values are not finite, the first at row {row}, {column}"
    own_quantiser = operands.own_quantiser
    error = (got - operands.value).abs()
    bound = ROUNDOFF[problem.out_dtype] * operands.value.abs()
    bound += ACCUMULATION[problem.accuracy] * operands.mass + SUBNORMAL[problem.out_dtype] + 1e-30
    if own_quantiser:
        bound += QUANTISER * operands.largest
    share = error / bound
    worst = float(share.max())
    if worst > 1:
        row, column = divmod(int(share.argmax()), problem.n)
        return worst, (
            f"row {row}, column {column} is {float(got[row, column]):.6g} instead of "
            f"{float(operands.value[row, column]):.6g}, {worst:.3g} times the bound"
        )
    noise, signal = error.square().sum(1), operands.value.square().sum(1)
    ratio = torch.where(noise == 0, math.inf, 10 * torch.log10(signal / noise))
    floor = FLOORS[problem.accuracy][problem.out_dtype]
    floor = min(floor, QUANTISER_FLOOR) if own_quantiser else floor
    if float(ratio.min()) < floor:
        return worst, (
            f"row {int(ratio.argmin())} has {float(ratio.min()):.1f} dB, needs {floor:.0f} dB"
        )
    if not operands.unchanged():
        return worst, "it changed its operands"
    return worst, None


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
