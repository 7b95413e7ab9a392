"""The Hopper kernels compute the right numbers, run in `gluon_emulator` on the CPU."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.gluon import BACKEND
from fp8dispatch.formats import dtype_name
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import quantize_activation
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8dispatch.kernels.hopper_config import HopperConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which exists for Linux"
)

LARGE = Recipe(Granularity.BLOCK, (384, 256))
TALL = Recipe(Granularity.BLOCK, (256, 128))
WHOLE = Recipe(Granularity.BLOCK, (300, 290))
RECIPES = [BLOCK_128, ROW, LARGE]


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    """The backend over emulated kernels on a device of three multiprocessors."""
    from fp8dispatch.backends.compute import gluon
    from fp8dispatch.kernels import (
        direct_launch,
        hopper_decode,
        hopper_gemm,
        hopper_launch,
        hopper_split,
        hopper_tile,
    )
    from tests.kernels import gluon_emulator

    def memory(device: torch.device, elements: int, counters: int) -> Any:
        return torch.full((elements,), math.nan), torch.zeros(counters, dtype=torch.int32)

    with pytest.MonkeyPatch.context() as patch:
        modules = [hopper_decode, hopper_gemm, hopper_split, hopper_tile]
        for module, name, stand_in in gluon_emulator.replacements(modules):
            patch.setattr(module, name, stand_in, raising=False)
        patch.setattr(direct_launch.Kernel, "__call__", gluon_emulator.run)
        patch.setattr(direct_launch, "_kernels", {})
        patch.setattr(hopper_launch, "_plans", {})
        patch.setattr(BACKEND, "_kernels", hopper_launch)
        patch.setattr(gluon, "workspace", memory)
        yield


@dataclass
class Operands:
    """One call and its truth."""

    m: int
    n: int
    k: int
    recipe: Recipe = BLOCK_128
    out_dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    weight_dtype: torch.dtype = torch.float8_e4m3fn

    def check(self, config: HopperConfig | None = None) -> None:
        data, scale = oracle.make_weight(self.n, self.k, self.recipe, dtype=self.weight_dtype)
        x = torch.randn(self.m, self.k, dtype=torch.bfloat16)
        x[0, : self.k // 2] *= 30
        bias = torch.randn(self.n) if self.bias else None
        made = quantize_activation(
            x, self.recipe.group_size(self.k), torch.float8_e4m3fn, use_kernels=False
        )
        problem = LinearProblem(
            self.m, self.n, self.k, self.recipe, dtype_name(self.weight_dtype), "float8_e4m3fn",
            dtype_name(self.out_dtype), self.bias,
        )  # fmt: skip
        fp32 = weight_scale_fp32(scale, self.recipe, self.n, self.k)
        weight = Weight(data, fp32, self.recipe, scale)
        out = BACKEND.multiply(made, weight, bias, problem, config)
        expected = oracle.linear_truth(x, data, scale, self.recipe, bias)
        floor = None if self.n >= 128 else 40.0  # see `oracle.assert_matches`
        oracle.assert_matches(out, expected, label=str(self), min_sqnr=floor)


def of_kind(kind: str, m: int, n: int, k: int) -> HopperConfig:
    from fp8dispatch.kernels.hopper_config import decode_config, gemm_config

    if kind == "decode":
        return decode_config(m, n, k, 3)
    if kind.startswith("decode"):
        found = decode_config(m, n, k, 132)
        if kind == "decode tall":
            chunk = min(found.chunk, 2)
            stages = min(found.stages, 8) // chunk * chunk
            return found._replace(block_n=128, chunk=chunk, stages=stages, warps=8)
        return found._replace(split=3, chunk=1, stages=min(found.stages, max(1, k // 128 // 3)))
    narrow = kind.startswith("narrow")
    if kind.startswith(("split", "narrow ")):
        return gemm_config("split", m, k, split=int(kind[-1]), narrow=narrow)
    masked = kind == "square 4"
    return gemm_config("wide" if kind == "wide" else "square", m, k, masked=masked, narrow=narrow)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["wide", "square", "square 4", "split 2", "split 3", "narrow", "narrow 2", "narrow 3"]
)
def test_every_gemm(kind: str, recipe: Recipe) -> None:
    """Tails of M, N and K, several tiles a program, short and long K, every output dtype."""
    for m, n, k, dtype, bias in [
        (130, 776, 144, torch.float16, True),
        (257, 136, 1040, torch.float32, True),
        (140, 1160, 1664, torch.bfloat16, False),
    ]:
        Operands(m, n, k, recipe, dtype, bias).check(of_kind(kind, m, n, k))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("kind", ["decode", "decode tall", "decode split"])
def test_every_decode_kernel(kind: str, recipe: Recipe) -> None:
    for m, n, k, dtype, bias in [
        (1, 1, 16, torch.float32, True),
        (2, 201, 1040, torch.float16, True),
        (16, 512, 1664, torch.bfloat16, False),
        (33, 320, 2048, torch.bfloat16, True),
        (64, 264, 3328, torch.bfloat16, False),
    ]:
        Operands(m, n, k, recipe, dtype, bias).check(of_kind(kind, m, n, k))


@pytest.mark.parametrize("kind", ["square 4", "split 2", "narrow", "narrow 2", "decode"])
def test_outputs_that_bulk_copies_cannot_store(kind: str) -> None:
    for m, n, k in ((33, 201, 640), (64, 1, 256), (1, 999, 384)):
        Operands(m, n, k, bias=True).check(of_kind(kind, m, n, k))


@pytest.mark.parametrize("kind", ["wide", "square", "split 2", "decode"])
def test_e5m2_weights(kind: str) -> None:
    for recipe in (BLOCK_128, TENSOR):
        operands = Operands(40, 264, 640, recipe, weight_dtype=torch.float8_e5m2)
        operands.check(of_kind(kind, 40, 264, 640))


@pytest.mark.parametrize("m", [5, 130])
def test_blocks_that_reach_over_all_of_n_and_k(m: int) -> None:
    for n, k in ((300, 288), (200, 160)):
        Operands(m, n, k, WHOLE, bias=True).check()


@pytest.mark.parametrize("m", [5, 40])
def test_a_kernel_that_starts_early(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8dispatch.kernels import hopper_launch

    monkeypatch.setattr(hopper_launch, "PROGRAMMATIC", True)
    for n, k in ((264, 1280), (201, 1040)):
        Operands(m, n, k, bias=True).check()


@settings(max_examples=25)
@given(
    m=st.integers(1, 300),
    n=st.integers(1, 800),
    k=st.integers(1, 90).map(lambda blocks: blocks * 16),
    recipe=st.sampled_from([*RECIPES, TENSOR, TALL]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    weight_dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
)
def test_any_size_through_the_choice_of_kernels(
    m: int,
    n: int,
    k: int,
    recipe: Recipe,
    bias: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    Operands(m, n, k, recipe, dtype, bias, weight_dtype).check()
