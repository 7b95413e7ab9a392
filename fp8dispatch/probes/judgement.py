"""What the canary holds an output against: bounds by element and by row.

``mass`` is the sum of the absolute products plus |bias|, so a zeroed or scrambled row cannot hide
behind large neighbours:

    |out - truth| <= roundoff(out dtype) * |truth| + accumulation * mass      for each element
    SQNR >= floor                                                             for each row
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from fp8dispatch.formats import dtype_name
from fp8dispatch.problem import Accuracy, LinearProblem

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
