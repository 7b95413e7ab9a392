"""One call of an FP8 linear as plain data: what the router sees instead of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fp8dispatch.recipe import Recipe

FLOAT8_NAMES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
"""The FP8 dtypes of operands, as torch names them."""


class Accuracy(str, Enum):
    """How a backend accumulates over K.

    ``EXACT``: partial sums are promoted into fp32 at least every 128 of K.
    ``FAST``: the tensor core accumulates over all of K with about 14 bits: 62, 57, 54, 50 dB
    at K = 2048, 4096, 7168, 16384 on Hopper, and no row below 43 dB up to K = 16384.
    """

    EXACT = "exact"
    FAST = "fast"


@dataclass(frozen=True)
class LinearProblem:
    """``[M, K] x [N, K] -> [M, N]`` over an FP8 weight; dtypes are names such as ``"bfloat16"``.

    Attributes:
        m, n, k: sizes of the multiplication; the leading shape of X is already flattened into m.
        recipe: what the weight scale means.
        weight_dtype, activation_dtype: FP8 dtypes of the two operands of the multiplication.
        out_dtype: dtype of the output.
        has_bias: a bias [N] is added.
        static_activation: activations use one given scale instead of scales computed per call.
        weight_row_major: the weight's rows lie one after the other with K contiguous.
        weight_contiguous: its rows lie side by side, without gaps.
        aligned: the weight's memory and its rows start at multiples of 16 bytes.
        accuracy: the least exact class of accumulation that the policy allows.
        batch_invariant: a row's result may depend on no other row, nor on M.
    """

    m: int
    n: int
    k: int
    recipe: Recipe
    weight_dtype: str
    activation_dtype: str
    out_dtype: str
    has_bias: bool = False
    static_activation: bool = False
    weight_row_major: bool = True
    weight_contiguous: bool = True
    aligned: bool = True
    accuracy: Accuracy = Accuracy.EXACT
    batch_invariant: bool = False

    def __str__(self) -> str:
        static = ", static activations" if self.static_activation else ""
        bias = ", bias" if self.has_bias else ""
        invariant = ", batch-invariant" if self.batch_invariant else ""
        return (
            f"M={self.m} N={self.n} K={self.k}, {self.recipe}, {self.weight_dtype} weight, "
            f"{self.out_dtype} output{bias}{static}{invariant}"
        )
