"""Machines, problems and calls that the tests of the library backends share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from fp8dispatch.backends.contract import Weight
from fp8dispatch.formats import dtype_name
from fp8dispatch.machine import Machine
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation
from fp8dispatch.recipe import BLOCK_128, ROW, Granularity, Recipe
from tests import oracle

if TYPE_CHECKING:
    from fp8dispatch.backends.contract import Backend
    from fp8dispatch.errors import Refusal

VERSIONS = {
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "cuda": "13.0",
    "fbgemm-gpu-genai": "1.6.0+cu130",
    "mslk-cuda": "1.1.0",
    "torchao": "0.17.0",
    "sgl-deep-gemm": "0.1.5.post1",
}
H200 = Machine("cuda", "NVIDIA H200", (9, 0), VERSIONS)
A100 = Machine("cuda", "NVIDIA A100", (8, 0), VERSIONS)
L40S = Machine("cuda", "NVIDIA L40S", (8, 9), VERSIONS)
B200 = Machine("cuda", "NVIDIA B200", (10, 0), VERSIONS)
B300 = Machine("cuda", "NVIDIA B300", (10, 3), VERSIONS)
RTX_5090 = Machine("cuda", "NVIDIA GeForce RTX 5090", (12, 0), VERSIONS)
GB10 = Machine("cuda", "NVIDIA GB10", (12, 1), VERSIONS)
CPU = Machine("cpu", "cpu", None, VERSIONS)
MI300X = Machine("cuda", "AMD Instinct MI300X", (9, 4), {**VERSIONS, "hip": "7.0"})
ROCM_9_0 = Machine("cuda", "AMD", (9, 0), {**VERSIONS, "hip": "7.0"})

_E4M3 = "float8_e4m3fn"
BLOCK = LinearProblem(17, 4096, 7168, BLOCK_128, _E4M3, _E4M3, "bfloat16")
blocks = partial(replace, BLOCK)
rows = partial(replace, BLOCK, recipe=ROW)
GROUPS = Recipe(Granularity.BLOCK, (1, 128))


def having(machine: Machine, **versions: str | None) -> Machine:
    """The machine with other versions; underscores stand for hyphens, None for "not installed"."""
    changed = {name.replace("_", "-"): text for name, text in versions.items()}
    together = {**machine.versions, **changed}
    return replace(machine, versions={k: v for k, v in together.items() if v is not None})


def told(refusals: tuple[Refusal, ...]) -> list[str]:
    """Refusals as ``code: sentence``."""
    return [f"{refusal.code}: {refusal}" for refusal in refusals]


@dataclass
class Call:
    """The tensors of one call and what they should give, on the CPU.

    The activations have a row of zeros, a group of zeros and a group with a large maximum, where
    they are large enough.
    """

    m: int
    n: int
    k: int
    recipe: Recipe
    bias_dtype: torch.dtype | None = None
    static: bool = False
    accuracy: Accuracy = Accuracy.EXACT
    rows_per_scale: int = 1

    def __post_init__(self) -> None:
        self.data, self.scale = oracle.make_weight(self.n, self.k, self.recipe)
        self.x = torch.randn(self.m, self.k, dtype=torch.bfloat16)
        self.x[0, 128:256] *= 50
        if self.m > 2:
            self.x[1] = 0
            self.x[2, :128] = 0
        self.bias = None if self.bias_dtype is None else torch.randn(self.n).to(self.bias_dtype)
        self.activation_scale = torch.tensor([0.013]) if self.static else None
        self.problem = LinearProblem(
            self.m,
            self.n,
            self.k,
            self.recipe,
            dtype_name(self.data.dtype),
            _E4M3,
            "bfloat16",
            self.bias is not None,
            self.static,
            accuracy=self.accuracy,
        )
        self.weight = Weight(
            self.data,
            weight_scale_fp32(self.scale, self.recipe, self.n, self.k),
            self.recipe,
            self.scale,
        )

    def judge(self, out: torch.Tensor) -> None:
        """The output's shape, dtype and numbers are right."""
        assert out.shape == (self.m, self.n)
        assert out.dtype == torch.bfloat16
        expected = oracle.linear_truth(
            self.x,
            self.data,
            self.scale,
            self.recipe,
            self.bias,
            self.activation_scale,
            self.rows_per_scale,
        )
        # A row of a few columns is judged by element; see `oracle.assert_matches`.
        floor = None if self.n >= 128 else 40.0
        oracle.assert_matches(out, expected, label=str(self.problem), min_sqnr=floor)

    def check_linear(self, backend: Backend) -> None:
        """Raw activations give the right numbers."""
        arguments = (self.x, self.weight, self.bias, self.activation_scale, self.problem)
        self.judge(backend.linear(*arguments))

    def check_matmul(self, backend: Backend) -> None:
        """So do quantised ones, however they lie in memory."""
        group = self.recipe.group_size(self.k)
        plain = quantize_activation(
            self.x,
            group,
            torch.float8_e4m3fn,
            self.activation_scale,
            use_kernels=False,
            rows_per_scale=self.rows_per_scale,
        )
        wide = torch.zeros(self.m, self.k + 19, dtype=torch.uint8)
        wide[:, 3 : self.k + 3] = plain.data.view(torch.uint8)
        odd = wide.view(torch.float8_e4m3fn)[:, 3 : self.k + 3]
        moved = torch.zeros(self.m * self.k + 1, dtype=torch.uint8)[1:].view(self.m, self.k)
        moved.copy_(plain.data.view(torch.uint8))
        for data in (plain.data, odd, moved.view(torch.float8_e4m3fn)):
            for scale in (plain.scale, plain.scale.contiguous()):
                quantized = QuantizedActivation(data, scale)
                self.judge(backend.matmul(quantized, self.weight, self.bias, self.problem))
