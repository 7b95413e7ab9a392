"""The numerics matrix: every backend x recipe x output dtype x bias x shape, judged by the oracle.

Each case has two possible outcomes: numbers within the bounds of `tests.oracle`, or a refusal
sentence. The GPU tests assert that; ``bench/numerics.py`` writes down how close each case came.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import fp8dispatch
from fp8dispatch import registry
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle

SHIPPED = ("cublaslt", "triton", "eager")
"""Backends that need nothing but torch and triton, and so run on every GPU of the tests."""

RECIPES: dict[str, Recipe] = {
    "tensor": TENSOR,
    "row": ROW,
    "block128x128": BLOCK_128,
    "block64x128": Recipe(Granularity.BLOCK, (64, 128)),
    "block128x64": Recipe(Granularity.BLOCK, (128, 64)),
    "group128": Recipe(Granularity.BLOCK, (1, 128)),
    "group64": Recipe(Granularity.BLOCK, (1, 64)),
    "group32": Recipe(Granularity.BLOCK, (1, 32)),
}
ROWS = (0, 1, 3, 4, 31, 130)
# (N, K): aligned, N ragged by 8, both ragged but multiples of 16, both odd, long K.
SHAPES = ((256, 512), (264, 512), (272, 1040), (201, 333), (256, 16384))
LARGE = ((4096, 1024, 2048), (4096, 264, 1040), (4096, 256, 16384))
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BIASES = ("none", "output", "float32")


@dataclass(frozen=True)
class Case:
    """One call of the matrix."""

    backend: str
    recipe: str
    m: int
    n: int
    k: int
    out_dtype: torch.dtype
    bias: str
    static: bool = False

    @property
    def label(self) -> str:
        """A short name for messages and tables."""
        dtype = str(self.out_dtype).removeprefix("torch.")
        static = " static" if self.static else ""
        return (
            f"{self.backend} {self.recipe}{static} {self.m}x{self.n}x{self.k} {dtype} "
            f"bias={self.bias}"
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        refusal: the sentence, or None when the call ran.
        bound_used: largest error as a share of the per-element bound.
        sqnr: lowest signal-to-noise ratio of a row, dB.
        grad_sqnr: the same for dX.
    """

    refusal: str | None = None
    bound_used: float = 0.0
    sqnr: float = float("inf")
    grad_sqnr: float = float("inf")


def cases(backend: str, recipe: str) -> Iterator[Case]:
    """The matrix of one backend and recipe."""
    shapes = [(m, n, k) for (n, k), m in itertools.product(SHAPES, ROWS)] + list(LARGE)
    for (m, n, k), out_dtype, bias in itertools.product(shapes, OUT_DTYPES, BIASES):
        if bias == "output" and out_dtype == torch.float32:
            continue  # the same as "float32"
        yield Case(backend, recipe, m, n, k, out_dtype, bias)
    for m, out_dtype in itertools.product((1, 31, 130), OUT_DTYPES):
        yield Case(backend, recipe, m, 272, 1040, out_dtype, "float32", static=True)


def affordable(case: Case) -> bool:
    """TorchAO times 48 configurations for each N, K and power of two of M: a few of them."""
    refused = case.bias != "none" or case.out_dtype != torch.bfloat16 or case.k % 128 != 0
    if case.backend != "torchao" or case.recipe != "block128x128" or refused:
        return True
    return (case.n, case.k) == (264, 512) and case.m in (0, 3, 4, 130)


class Bench:
    """Runs cases, keeping the operands and the truth of the last shape."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._key: tuple[object, ...] = ()

    def _operands(self, case: Case) -> None:
        rows_per_scale = registry.load(case.backend).rows_per_scale
        key = (case.recipe, case.m, case.n, case.k, case.static, rows_per_scale)
        if key == self._key:
            return
        self._key = key
        recipe = RECIPES[case.recipe]
        self.weight, self.scale = oracle.make_weight(case.n, case.k, recipe, device=self.device)
        self.x = torch.randn(case.m, case.k, device=self.device, dtype=torch.bfloat16)
        if case.m > 3:
            self.x[2] = 0
            self.x[3, : case.k // 3] *= 50
        self.bias = torch.randn(case.n, device=self.device)
        self.activation_scale = torch.tensor([0.013], device=self.device) if case.static else None
        self.wide_weight = oracle.dequantized_weight(self.weight, self.scale, recipe)
        self.wide_x = oracle.dequantized_activations(
            self.x,
            recipe,
            activation_scale=self.activation_scale,
            rows_per_scale=rows_per_scale,
        )

    def run(self, case: Case, accumulation: float = oracle.EXACT_ACCUMULATION) -> Outcome:
        """Run a case with its backend forced; a third outcome raises.

        Raises:
            AssertionError: numbers outside the bounds.
        """
        self._operands(case)
        bias = {
            "none": None,
            "output": self.bias.to(case.out_dtype),
            "float32": self.bias,
        }[case.bias]
        x = self.x.clone().requires_grad_()
        try:
            out = fp8dispatch.fp8_linear(
                x,
                self.weight,
                self.scale,
                bias,
                block_size=RECIPES[case.recipe].block_size,
                activation_scale=self.activation_scale,
                out_dtype=case.out_dtype,
                backend=case.backend,
            )
        except BackendUnavailableError as refusal:
            return Outcome(refusal=str(refusal))
        assert out.shape == (case.m, case.n), case.label
        assert out.dtype == case.out_dtype, case.label
        grad = torch.randn(out.shape, device=self.device).to(out.dtype)
        out.backward(grad)
        if case.m == 0:
            assert x.grad is not None and x.grad.shape == x.shape, case.label
            return Outcome()
        expected = oracle.truth(self.wide_x, self.wide_weight, bias)
        oracle.assert_matches(out, expected, accumulation=accumulation, label=case.label)
        expected_grad = grad.double() @ self.wide_weight
        grad_sqnr = oracle.sqnr(x.grad, expected_grad).min().item()
        assert grad_sqnr >= oracle.MIN_SQNR_GRAD, f"{case.label}: dX at {grad_sqnr:.1f} dB"
        return Outcome(
            None,
            oracle.bound_used(out, expected, accumulation),
            oracle.sqnr(out, expected.value).min().item(),
            grad_sqnr,
        )
