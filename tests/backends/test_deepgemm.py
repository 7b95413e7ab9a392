"""DeepGEMM: refusals, and the adapter over a fake that asserts what the real one asserts."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from fp8dispatch.backends import deepgemm
from fp8dispatch.backends.deepgemm import BACKEND, DeepGemm
from fp8dispatch.backends.library import Warmed
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128
from tests.backends.cases import (
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
    from pathlib import Path

FITS = "sgl-deep-gemm (pip install 'sgl-deep-gemm==0.1.5.post1' fits torch 2.11)"
NONE = having(H200, sgl_deep_gemm=None)
A_GPU = "capability: needs a CUDA device of capability 9.0, found "


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (H200, []),
        (having(H200, sgl_deep_gemm="0.1.5.post1+cu130"), []),
        (having(H200, sgl_deep_gemm="0.2.5", torch="2.14.0"), []),
        (NONE, [f"version: needs {FITS}, found none"]),
        (
            having(NONE, deep_gemm="1.0.0"),
            [
                f"distribution: needs {FITS}, found only deep-gemm 1.0.0, on PyPI an empty "
                f"placeholder"
            ],
        ),
        (
            having(H200, sgl_deep_gemm="0.1.5.post2"),
            [
                "torch: needs sgl-deep-gemm <= 0.1.5.post1 with torch 2.11, or a later torch, "
                "found sgl-deep-gemm 0.1.5.post2 and torch 2.11.0+cu130"
            ],
        ),
        (
            having(H200, sgl_deep_gemm="main"),
            ["version: needs a readable version of sgl-deep-gemm, found main"],
        ),
        (B200, [A_GPU + str(B200)]),  # it would round our scales up to powers of two
        (L40S, [A_GPU + str(L40S)]),
        (CPU, [A_GPU + "cpu"]),
        (ROCM_9_0, [f"{A_GPU}ROCm on {ROCM_9_0}"]),
    ],
)
def test_machine(machine: Machine, expected: list[str]) -> None:
    assert told(BACKEND.refuse_machine(machine)) == expected


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (blocks(), []),
        (blocks(n=264, k=1008, static_activation=True), []),
        (rows(), ["recipe: needs a block recipe, found row"]),
        (blocks(recipe=GROUPS), ["block-size: needs blocks 128x128, found block 1x128"]),
        (
            blocks(has_bias=True),
            [
                "bias: needs no bias with block scales (added to its bfloat16 product it would be "
                "rounded twice: use a backend that fuses it, or add it outside), found one"
            ],
        ),
        (blocks(n=4100), ["align-n: needs N a multiple of 8, found N=4100"]),
        (blocks(k=7160), ["align-k: needs K a multiple of 16, found K=7160"]),
        (blocks(out_dtype="float32"), ["out-dtype: needs out dtype bfloat16, found float32"]),
        (
            blocks(weight_dtype="float8_e5m2"),
            ["weight-dtype: needs weight dtype float8_e4m3fn, found float8_e5m2"],
        ),
        (
            blocks(weight_row_major=False),
            ["layout: needs a row-major weight [N, K], found other strides"],
        ),
        (
            blocks(aligned=False),
            ["alignment: needs weight memory aligned to 16 bytes, found an odd address"],
        ),
        (
            blocks(m=2**16, n=2**15),
            [
                f"size: needs M x N below 2**31 elements (32-bit offsets), found {2**31}",
            ],
        ),
    ],
)
def test_problem(problem: LinearProblem, expected: list[str]) -> None:
    assert told(BACKEND.refuse_problem(problem, H200)) == expected


Operand = tuple[torch.Tensor, torch.Tensor]


class Library(types.ModuleType):
    """``deep_gemm`` with the checks of its ``fp8_gemm_nt`` on capability 9.0."""

    def __init__(self, home: str) -> None:
        super().__init__("deep_gemm")
        self.home = home
        self.copied = 0
        self.calls = 0
        self.guarded = False

    def find_cuda_home(self) -> str:
        return self.home

    def fp8_gemm_nt(
        self, a: Operand, b: Operand, d: torch.Tensor, *, disable_ue8m0_cast: bool = False
    ) -> None:
        self.calls += 1
        assert self.guarded, "launches on the current device"
        assert disable_ue8m0_cast
        (a_data, sa), (b_data, sb) = a, b
        (m, k), n = a_data.shape, b_data.shape[0]
        groups = -(-k // 128)
        for operand in (a_data, b_data, d):
            assert operand.stride(1) == 1
            assert operand.stride(0) * operand.element_size() % 16 == 0
            assert operand.data_ptr() % 16 == 0
        assert sa.dtype == sb.dtype == torch.float32
        assert sa.shape == (m, groups)
        assert sb.shape == (-(-n // 128), groups)
        assert sb.is_contiguous()
        assert d.shape == (m, n) and d.dtype == torch.bfloat16
        aligned_m = -(-m // 4) * 4
        if sa.stride() != (1, aligned_m):
            self.copied += 1
        group_of = torch.arange(k) // 128
        wide_a = a_data.float().double() * sa.double()[:, group_of]
        wide_b = b_data.float().double() * sb.double()[torch.arange(n) // 128][:, group_of]
        d.copy_(wide_a @ wide_b.t())


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    planted = Library(str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setitem(sys.modules, "deep_gemm", planted)

    @contextmanager
    def guard(tensor: torch.Tensor) -> Iterator[None]:
        planted.guarded = True
        try:
            yield
        finally:
            planted.guarded = False

    monkeypatch.setattr("fp8dispatch.backends.compute.deepgemm.on_device", guard)
    return planted


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (264, 1008), (8, 16), (272, 1040), (136, 128)])
@pytest.mark.parametrize("m", [1, 3, 4, 130])
def test_numbers(m: int, n: int, k: int, static: bool, library: Library) -> None:
    backend = DeepGemm()
    call = Call(m, n, k, BLOCK_128, static=static)
    call.check_linear(backend)
    call.check_matmul(backend)
    assert library.copied == 0, "scales already lie as it wants them"


def test_no_compiler_is_a_refusal(library: Library, tmp_path: Path) -> None:
    (tmp_path / "bin" / "nvcc").unlink()
    backend = DeepGemm()
    assert told(backend.loadable(BLOCK_128)) == [
        f"compiler: needs the CUDA compiler nvcc for its kernels (install the toolkit, set "
        f"CUDA_HOME), found no bin/nvcc in {tmp_path}"
    ]
    with pytest.raises(BackendUnavailableError, match="deepgemm needs the CUDA compiler nvcc"):
        Call(1, 128, 128, BLOCK_128).check_linear(backend)
    assert library.calls == 0


def test_no_toolkit_at_all_fails_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> types.ModuleType:
        assert name != "deep_gemm", ""  # as the real one's ``assert cuda_home is not None``
        return types.ModuleType(name)

    monkeypatch.setattr(deepgemm, "import_module", load)
    (reason,) = DeepGemm().loadable(BLOCK_128)
    assert reason.code == "import"
    assert "CUDA toolkit" in reason.need
    assert reason.found.startswith("AssertionError")


class TestWarmed:
    """First calls compile: not during graph capture, and remembered within bounds."""

    cuda = torch.device("cuda", 0)

    def test_capture_refuses_what_never_ran(self, monkeypatch: pytest.MonkeyPatch) -> None:
        warmed, out = Warmed("deepgemm", "may compile a kernel"), torch.ones(1)
        capturing = [False]
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
        assert warmed.run((1, 2), self.cuda, lambda: out) is out
        capturing[0] = True
        assert warmed.run((1, 2), self.cuda, lambda: out) is out
        for key, device in (((1, 3), self.cuda), ((1, 2), torch.device("cuda", 1))):
            with pytest.raises(BackendUnavailableError, match=r"before CUDA graph capture.*run"):
                warmed.run(key, device, lambda: out)

    def test_a_call_that_fails_is_not_warm(self) -> None:
        warmed = Warmed("deepgemm", "may compile a kernel")

        def fail() -> torch.Tensor:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            warmed.run(1, torch.device("cpu"), fail)
        assert not warmed._keys

    def test_memory_is_bounded(self) -> None:
        warmed = Warmed("deepgemm", "may compile a kernel", limit=4)
        for key in range(10):
            warmed.run(key, torch.device("cpu"), lambda: torch.ones(1))
        assert 1 <= len(warmed._keys) <= 4
