"""The Gluon backend: its refusals, and what it hands to its kernels, over a stand-in for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest
import torch

from fp8dispatch import registry
from fp8dispatch.backends.compute import gluon
from fp8dispatch.backends.gluon import BACKEND, Gluon
from fp8dispatch.kernels.hopper_config import (
    KINDS,
    HopperConfig,
    choose_config,
    decode_config,
    gemm_config,
)
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import quantize_activation
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe, ceil_div
from fp8dispatch.workspace import _carve
from tests.backends.cases import (
    A100,
    B200,
    CPU,
    GROUPS,
    H200,
    L40S,
    ROCM_9_0,
    Call,
    blocks,
    having,
    rows,
    told,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


def block(rows: int, columns: int) -> Recipe:
    return Recipe(Granularity.BLOCK, (rows, columns))


VERSION = "version: needs triton 3.6 to 3.9 (Gluon changes with each release), found "
A_GPU = "capability: needs a CUDA device of capability 9.0, found "


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (H200, []),
        (having(H200, triton="3.9.0"), []),
        (having(H200, triton="3.5.1"), [VERSION + "3.5.1"]),
        (having(H200, triton="3.10.0"), [VERSION + "3.10.0"]),
        (having(H200, triton=None), [VERSION + "none"]),
        (having(H200, triton="2026.9.21"), [VERSION + "2026.9.21"]),
        (A100, [A_GPU + str(A100)]),
        (L40S, [A_GPU + str(L40S)]),
        (B200, [A_GPU + str(B200)]),
        (CPU, [A_GPU + "cpu"]),
        (ROCM_9_0, [f"{A_GPU}ROCm on {ROCM_9_0}"]),
        (
            replace(CPU, triton_interpreter=True),
            [
                "interpreter: needs a GPU (Triton's interpreter knows no Gluon), found "
                "TRITON_INTERPRET",
                A_GPU + "cpu",
            ],
        ),
    ],
)
def test_machine(machine: Machine, expected: list[str]) -> None:
    assert told(BACKEND.refuse_machine(machine)) == expected


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (blocks(), []),
        (blocks(m=1, n=1, k=16, has_bias=True, out_dtype="float32"), []),
        (rows(m=4096, n=201, out_dtype="float16"), []),
        (rows(recipe=TENSOR, static_activation=True), []),
        (blocks(k=7160), ["align-k: needs K a multiple of 16, found K=7160"]),
        (
            blocks(recipe=GROUPS),
            [
                "block-size: needs blocks whose sides are multiples of 128 (or all of N or K), "
                "found block 1x128"
            ],
        ),
        (blocks(recipe=block(256, 384)), []),
        (blocks(n=200, k=400, recipe=block(200, 500)), []),
        (
            blocks(n=4096, k=512, recipe=block(128, 64)),
            [
                "block-size: needs blocks whose sides are multiples of 128 (or all of N or K), "
                "found block 128x64"
            ],
        ),
        (blocks(weight_dtype="float8_e5m2"), []),
        (
            blocks(weight_dtype="float8_e4m3fnuz"),
            [
                "weight-dtype: needs weight dtype float8_e4m3fn or float8_e5m2, found "
                "float8_e4m3fnuz"
            ],
        ),
        (
            blocks(weight_row_major=False),
            ["layout: needs a row-major weight [N, K], found other strides"],
        ),
        (
            blocks(aligned=False),
            [
                "alignment: needs weight memory and rows aligned to 16 bytes, found an odd address "
                "or row stride"
            ],
        ),
    ],
)
def test_problem(problem: LinearProblem, expected: list[str]) -> None:
    assert told(BACKEND.refuse_problem(problem, H200)) == expected


def test_it_is_registered_and_trusted_with_the_triton_it_ran_with() -> None:
    assert registry.load("gluon") is BACKEND
    for version, verified in (("3.6.0", True), ("3.7.1", False)):
        machine = replace(H200, versions={**H200.versions, "triton": version})
        assert BACKEND.is_verified(machine) is verified


@pytest.mark.parametrize("multiprocessors", [132, 114, 78], ids=["H200", "H100 PCIe", "H20"])
def test_the_canary_reaches_every_kernel(multiprocessors: int) -> None:
    """Each kind, more tiles than SMs, a shared K, a K that is no multiple of 128, masked stores."""
    reached: set[str] = set()
    for m, n, k in ((132, 272, 640), *BACKEND.canary_sizes):
        assert told(BACKEND.refuse_problem(blocks(m=m, n=n, k=k), H200)) == []
        masked = n % 8 != 0
        config = choose_config(m, n, k, masked, multiprocessors)
        turns = "again" if config.tiles(m, n) > multiprocessors else "once"
        if config.kind in ("split", "decode"):
            turns = "shared" if config.split > 1 else "whole"
        narrow = config.kind == "square" and config.block_n == 64
        kind = "narrow" if narrow else config.kind
        reached |= {config.kind, f"{kind} {turns}"}
        reached |= {f"{kind} masked"} if masked else set()
        reached |= {f"{kind} flat"} if k % 128 else set()
    assert reached >= {
        *KINDS, "wide again", "square once", "square again", "square masked", "split shared",
        "narrow once", "narrow masked", "narrow flat", "decode shared", "decode whole",
        "decode flat",
    }  # fmt: skip


def test_a_failing_import_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise AttributeError("module 'gl' has no attribute 'barrier'")

    monkeypatch.setattr("fp8dispatch.backends.gluon.import_module", broken)
    assert told(Gluon().loadable(BLOCK_128)) == [
        "import: needs triton.experimental.gluon to import, found AttributeError: module 'gl' has "
        "no attribute 'barrier'"
    ]


class StandIn:
    """Computes in plain torch what `hopper_launch` does, and checks what it may rely on."""

    def __init__(self) -> None:
        self.config: HopperConfig | None = None

    any_scales = programmatic = False
    elements = counters = 0

    def plan_for(
        self,
        m: int,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        block_size: tuple[int, int] | None,
        config: HopperConfig | None = None,
    ) -> StandIn:
        n, k = b.shape
        self.block = block_size
        masked = n * out_dtype.itemsize % 16 != 0
        self.config = config or choose_config(m, n, k, masked, 132)
        self.any_scales = self.config.kind == "decode"
        self.elements, self.counters = self.config.workspace(m, n)
        return self

    def run(
        self,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        workspace: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        behind_quantizer: bool = False,
    ) -> None:
        assert not behind_quantizer
        m, k = a.shape
        n = b.shape[0]
        config = self.config
        assert config is not None
        for tensor in (a, a_scale, b, b_scale, out, *([] if bias is None else [bias])):
            assert tensor.data_ptr() % 16 == 0
        assert a.stride() == (k, 1) and out.is_contiguous()
        assert b.stride(1) == 1 and b.stride(0) % 16 == 0
        assert (self.block is None) == (b_scale.dim() == 1)
        groups = 1 if self.block is None else ceil_div(k, self.block[1])
        assert a_scale.shape == (m, groups)
        if config.kind == "decode":
            assert m <= config.block_m
        else:
            assert self.scales_fit(a_scale)
        assert (workspace is None) == (self.elements == 0)
        if workspace is not None:
            assert workspace[0].numel() >= self.elements
            assert workspace[1].numel() >= self.counters
        if self.block is not None:
            rows, columns = self.block
            wide = a_scale.repeat_interleave(columns, 1)[:, :k]
            wide_b = b_scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]
        else:
            wide, wide_b = a_scale, b_scale.reshape(-1, 1)
        product = (a.float() * wide).double() @ (b.float() * wide_b).double().t()
        out.copy_(product if bias is None else product + bias)

    def quantize(
        self,
        x: torch.Tensor,
        data: torch.Tensor,
        scale: torch.Tensor,
        group: int,
        *,
        dependents: bool,
    ) -> None:
        assert dependents == self.programmatic
        group = group if scale.shape[1] > 1 else x.shape[1]
        made = quantize_activation(x, group, torch.float8_e4m3fn, use_kernels=False)
        data.copy_(made.data)
        scale.copy_(made.scale)

    def scales_fit(self, scale: torch.Tensor) -> bool:
        m, groups = scale.shape
        fits_m, fits_k = m == 1 or scale.stride(0) == 1, groups == 1 or scale.stride(1) % 4 == 0
        return fits_m and fits_k and scale.data_ptr() % 16 == 0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    monkeypatch.setattr(BACKEND, "_kernels", stand_in)
    monkeypatch.setattr(
        gluon,
        "quantized_activations",
        lambda device, m, k, groups: _carve(torch.empty(2 << 20, dtype=torch.uint8), m, k, groups),
    )
    monkeypatch.setattr(
        gluon, "workspace", lambda device, elements, counters: (
            torch.empty(elements), torch.zeros(counters, dtype=torch.int32)
        )
    )  # fmt: skip
    yield stand_in


RECIPES = pytest.mark.parametrize(
    "recipe",
    [BLOCK_128, ROW, TENSOR, block(256, 128), block(128, 256), block(300, 290)],
    ids=str,
)


@RECIPES
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("m", [1, 3, 65, 130])
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32], ids=str)
def test_every_recipe_reaches_the_kernels_in_their_layout(
    m: int, recipe: Recipe, static: bool, bias: torch.dtype | None, kernels: StandIn
) -> None:
    call = Call(m, 201, 272, recipe, bias_dtype=bias, static=static)
    call.check_linear(BACKEND)
    assert kernels.config is not None
    assert (kernels.config.kind == "decode") == (m <= 64)
    call.check_matmul(BACKEND)


@pytest.mark.parametrize(
    "config",
    [
        gemm_config("wide", 3, 272),
        gemm_config("square", 3, 272),
        gemm_config("split", 3, 272, split=2),
        decode_config(3, 264, 272, 132),
    ],
    ids=lambda config: config.kind,
)
def test_a_kernel_can_be_chosen(config: HopperConfig, kernels: StandIn) -> None:
    call = Call(3, 264, 272, BLOCK_128)
    quantized = quantize_activation(call.x, 128, torch.float8_e4m3fn, use_kernels=False)
    call.judge(BACKEND.multiply(quantized, call.weight, None, call.problem, config))
    assert kernels.config == config


def test_scales_that_lie_right_are_not_copied() -> None:
    """M = 130 is no multiple of 4: the groups' scales start at multiples of 132."""
    _, scale = _carve(torch.empty(2 << 20, dtype=torch.uint8), 130, 272, 3)
    scale.copy_(torch.rand(130, 3))
    stand_in = cast("ModuleType", StandIn())

    assert scale.stride() == (1, 132)
    assert gluon._m_major(scale, 130, 3, stand_in) is scale
    laid_out = gluon._m_major(scale.contiguous(), 130, 3, stand_in)
    assert laid_out.stride() == (1, 132)
    assert torch.equal(laid_out, scale)
