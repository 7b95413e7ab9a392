"""One call of an FP8 linear as plain data: what the router sees instead of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from fp8dispatch.kernels.tile import Tile
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


class Dgrad(str, Enum):
    """How the gradient of X is computed, dX = dY @ W.

    ``DEQUANTIZED``: with the weight dequantised, in dY's dtype.
    ``FP8``: dY is quantised too, and an FP8 GEMM multiplies it with the weight as it is.
    """

    DEQUANTIZED = "dequantized"
    FP8 = "fp8"


@dataclass(frozen=True)
class LinearProblem:
    """``[M, K] x [N, K] -> [M, N]`` over an FP8 weight; dtypes are names such as ``"bfloat16"``.

    Attributes:
        family: of the class, what stands before a backend's name where it is registered.
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
        gradient: the product is dX [M, N] = dY [M, K] @ W, with dY in the place of X and the
            transposed weight in that of the weight (`fp8dispatch.dgrad`).
        tile: the tile that tuning found for the backend that was chosen; None leaves it to the
            backend. A decision sets it; it is no part of what is asked.
    """

    family: ClassVar[str] = ""

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
    gradient: bool = field(default=False, kw_only=True)
    tile: Tile | None = field(default=None, kw_only=True)

    def __str__(self) -> str:
        gradient = "the gradient of X as " if self.gradient else ""
        static = ", static activations" if self.static_activation else ""
        bias = ", bias" if self.has_bias else ""
        invariant = ", batch-invariant" if self.batch_invariant else ""
        return (
            f"{gradient}M={self.m} N={self.n} K={self.k}, {self.recipe}, "
            f"{self.weight_dtype} weight, {self.out_dtype} output{bias}{static}{invariant}"
        )


@dataclass(frozen=True)
class ExpertsProblem(LinearProblem):
    """``[M, K] x [E, N, K] -> [M, N]``: each row with the weight of one expert.

    Attributes:
        experts: number of experts, E.
        batched: each row names its expert; else rows come sorted by expert.
        gathers: rows are taken from other places of X by an index.
        scatters: rows are written to other places of the output by an index.
        static_per_expert: each expert has an activation scale of its own.
    """

    family: ClassVar[str] = "experts."

    experts: int = 1
    batched: bool = False
    gathers: bool = False
    scatters: bool = False
    static_per_expert: bool = False

    def __str__(self) -> str:
        way = "batched" if self.batched else "grouped"
        used = [name for name in ("gathers", "scatters") if getattr(self, name)]
        how = f" ({', '.join(used)})" if used else ""
        return f"{way} experts E={self.experts}{how} {super().__str__()}"
