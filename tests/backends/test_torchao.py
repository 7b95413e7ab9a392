"""TorchAO: refusals, its locations release by release, and the adapter over a literal fake."""

from __future__ import annotations

import math
import sys
import threading
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from fp8dispatch.backends import torchao
from fp8dispatch.backends.torchao import BACKEND, TorchAO
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128
from tests.backends.cases import (
    A100,
    B200,
    B300,
    CPU,
    GB10,
    GROUPS,
    H200,
    L40S,
    MI300X,
    RTX_5090,
    Call,
    blocks,
    having,
    rows,
    told,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MISSING = "version: needs torchao >= 0.12 (pip install torchao), found "
A_GPU = "capability: needs a CUDA device of capability 8.9, 9.0, 10.0, 10.3, 12.0, 12.1, found "


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        *[(machine, []) for machine in (H200, L40S, B200, B300, RTX_5090, GB10)],
        (having(H200, torchao="0.12.0"), []),
        (having(H200, torchao="0.19.0.dev20261001+cu130"), []),
        (having(H200, torchao=None, torchao_nightly="2026.9.1"), []),
        (having(H200, torchao=None), [MISSING + "none"]),
        (having(H200, torchao="0.11.0"), [MISSING + "0.11.0"]),
        (having(H200, torchao="odd"), [MISSING + "odd"]),
        (A100, [A_GPU + str(A100)]),
        (CPU, [A_GPU + "cpu"]),
        (MI300X, [f"{A_GPU}ROCm on {MI300X}"]),
        (
            having(H200, triton=None),
            ["version: needs triton, which its kernel is written in, found none"],
        ),
    ],
)
def test_machine(machine: Machine, expected: list[str]) -> None:
    assert told(BACKEND.refuse_machine(machine)) == expected


SIZE = "below 2**31 elements (32-bit offsets), found"


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (blocks(), []),
        (blocks(n=4097, static_activation=True), []),
        (rows(), ["recipe: needs a block recipe, found row"]),
        (blocks(recipe=GROUPS), ["block-size: needs blocks 128x128, found block 1x128"]),
        (
            blocks(has_bias=True),
            [
                "bias: needs no bias with block scales (added to its bfloat16 product it would be "
                "rounded twice: use a backend that fuses it, or add it outside), found one"
            ],
        ),
        (blocks(k=7184), ["align-k: needs K a multiple of 128, found K=7184"]),
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
            blocks(weight_contiguous=False),
            [
                "contiguous: needs a contiguous weight (make it contiguous once), found gaps "
                "between its rows"
            ],
        ),
        (
            blocks(aligned=False),
            ["alignment: needs weight memory aligned to 16 bytes, found an odd address"],
        ),
        (blocks(m=2**19, n=128, k=4096), [f"size: needs M x K {SIZE} {2**31}"]),
        (blocks(m=1, n=2**19, k=4096), [f"size: needs N x K {SIZE} {2**31}"]),
        (blocks(m=2**16, n=2**15, k=128), [f"size: needs M x N {SIZE} {2**31}"]),
        (blocks(m=2**16 - 1, n=2**15, k=128), []),
    ],
)
def test_problem(problem: LinearProblem, expected: list[str]) -> None:
    assert told(BACKEND.refuse_problem(problem, H200)) == expected


class Gemm:
    """``blockwise_fp8_gemm`` as torchao documents it, reading memory row by row."""

    def __init__(self, out_dtype: Callable[[], torch.dtype]) -> None:
        self.out_dtype = out_dtype
        self.calls = 0
        self.guarded = False

    def __call__(
        self,
        a: torch.Tensor,
        a_s: torch.Tensor,
        b: torch.Tensor,
        b_s: torch.Tensor,
        block_size: int = 128,
    ) -> torch.Tensor:
        self.calls += 1
        assert self.guarded, "launches on the current device"
        assert all(tensor.is_contiguous() for tensor in (a, a_s, b, b_s))
        (m, k), n = a.shape, b.shape[0]
        math.log2(m)
        groups, blocks_n = -(-k // block_size), -(-n // block_size)
        group_of, block_of = torch.arange(k) // block_size, torch.arange(n) // block_size
        a_memory = a_s.flatten().as_strided((m, groups), (groups, 1)).double()
        b_memory = b_s.flatten().as_strided((blocks_n, groups), (groups, 1)).double()
        wide_a = a.float().double() * a_memory[:, group_of]
        wide_b = b.float().double() * b_memory[block_of][:, group_of]
        return (wide_a @ wide_b.t()).to(self.out_dtype())


NEW, MIDDLE, OLD, PRIVATE = (module for module, _ in torchao._LOCATIONS)
# What each release's tree offers: module -> the names in it.
RELEASES = {
    "0.12": {OLD: ["blockwise_fp8_gemm"]},
    "0.14": {MIDDLE: ["blockwise_fp8_gemm"]},
    "0.17": {NEW: ["blockwise_fp8_gemm"], MIDDLE: ["blockwise_fp8_gemm"]},
    "0.19": {MIDDLE: ["BlockwiseQuantLinear"], PRIVATE: ["_blockwise_fp8_gemm"]},
}


def plant(
    monkeypatch: pytest.MonkeyPatch,
    tree: dict[str, list[str]],
    out_dtype: Callable[[], torch.dtype] = lambda: torch.bfloat16,
) -> tuple[TorchAO, Gemm]:
    """The backend over a fake torchao of one release."""
    for module, _ in torchao._LOCATIONS:
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises
    gemm = Gemm(out_dtype)
    for module, names in tree.items():
        planted = types.ModuleType(module)
        for name in names:
            setattr(planted, name, gemm)
        monkeypatch.setitem(sys.modules, module, planted)

    @contextmanager
    def guard(tensor: torch.Tensor) -> Iterator[None]:
        gemm.guarded = True
        try:
            yield
        finally:
            gemm.guarded = False

    monkeypatch.setattr("fp8dispatch.backends.compute.torchao.on_device", guard)
    return TorchAO(), gemm


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_is_found(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, gemm = plant(monkeypatch, RELEASES[release])
    assert backend.loadable(BLOCK_128) == ()
    Call(3, 256, 512, BLOCK_128).check_linear(backend)
    assert gemm.calls == 1


def test_a_release_without_it_tells_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = plant(monkeypatch, {MIDDLE: ["BlockwiseQuantLinear"]})
    (reason,) = backend.loadable(BLOCK_128)
    assert (reason.code, reason.need) == ("import", "torchao with its blockwise_fp8_gemm")
    assert all(module in reason.found for module in (NEW, MIDDLE, OLD, PRIVATE))
    assert "AttributeError" in reason.found and "ModuleNotFoundError" in reason.found
    with pytest.raises(BackendUnavailableError, match="torchao needs torchao with its"):
        Call(1, 128, 128, BLOCK_128).check_linear(backend)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (201, 640), (8, 128)])
@pytest.mark.parametrize("m", [1, 3, 4, 130])
def test_numbers(m: int, n: int, k: int, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = plant(monkeypatch, RELEASES["0.17"])
    call = Call(m, n, k, BLOCK_128, static=static)
    call.check_linear(backend)
    call.check_matmul(backend)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
def test_output_in_the_default_dtype(default: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = plant(monkeypatch, RELEASES["0.14"], lambda: default)
    Call(3, 256, 512, BLOCK_128).check_linear(backend)


def test_output_in_fp16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = plant(monkeypatch, RELEASES["0.14"], lambda: torch.float16)
    with pytest.raises(BackendUnavailableError, match=r"default dtype .* found torch.float16; up"):
        Call(3, 256, 512, BLOCK_128).check_linear(backend)


def test_first_calls_are_not_concurrent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lazy definitions and its timing are not safe together."""
    backend, _ = plant(monkeypatch, RELEASES["0.17"])
    inside: list[int] = []
    most: list[int] = []

    def gemm(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, *rest: object) -> torch.Tensor:
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.05)
        inside.pop()
        return torch.zeros(a.shape[0], b.shape[0], dtype=torch.bfloat16)

    backend.require(BLOCK_128)
    backend._gemm = gemm
    call = Call(3, 256, 512, BLOCK_128)
    threads = [
        threading.Thread(
            target=backend.linear, args=(call.x, call.weight, None, None, call.problem)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The first is alone; those that waited for its lock follow one by one.
    assert len(most) == 4
    assert max(most) == 1
