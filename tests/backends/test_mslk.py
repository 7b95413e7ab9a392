"""MSLK: what differs from FBGEMM is its names and its table of torch minors."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch.backends.mslk import BACKEND, Mslk
from fp8dispatch.machine import Machine
from fp8dispatch.recipe import BLOCK_128, ROW
from tests.backends import fake_cutlass
from tests.backends.cases import B200, H200, RTX_5090, Call, blocks, having, rows, told

FITS = "mslk-cuda (pip install mslk-cuda==1.1.0)"
NONE = having(H200, mslk_cuda=None)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (H200, []),
        (B200, []),
        (having(NONE, mslk="1.1.0+cu130"), []),
        (having(H200, mslk="0.0.0"), []),  # beside the right one
        (having(NONE, mslk_cuda_nightly="2026.9.21"), []),
        (having(H200, mslk_cuda="1.3.0", torch="2.13.0"), []),
        (NONE, [f"version: needs {FITS}, found none"]),
        (
            having(NONE, mslk="0.0.0"),
            [f"distribution: needs {FITS}, found only mslk 0.0.0, an empty placeholder"],
        ),
        (
            having(H200, mslk_cuda="0.0.0"),
            [f"distribution: needs {FITS}, found only mslk-cuda 0.0.0, an empty placeholder"],
        ),
        (
            having(H200, mslk_cuda="1.0.0"),
            [
                f"torch: needs torch 2.10, the one that mslk-cuda 1.0.0 loads with, or {FITS}, "
                f"found torch 2.11.0+cu130"
            ],
        ),
        (having(H200, mslk_cuda="0.9"), [f"version: needs {FITS}, found mslk-cuda 0.9"]),
        (having(H200, mslk_cuda="?"), ["version: needs a readable version of mslk-cuda, found ?"]),
        (
            RTX_5090,
            [
                f"capability: needs a CUDA device of capability 9.0 or 10.0 (consumer chips are "
                f"given the kernels of 9.0, which do not run there), found {RTX_5090}"
            ],
        ),
    ],
)
def test_machine(machine: Machine, expected: list[str]) -> None:
    assert told(BACKEND.refuse_machine(machine)) == expected


def test_blocks_on_hopper_and_rows_on_blackwell_too() -> None:
    assert BACKEND.refuse_problem(blocks(), H200) == ()
    assert BACKEND.refuse_problem(rows(has_bias=True), B200) == ()
    assert [reason.code for reason in BACKEND.refuse_problem(blocks(), B200)] == ["capability"]


@pytest.mark.parametrize("m", [1, 130])
def test_numbers(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = fake_cutlass.plant(Mslk, monkeypatch)
    Call(m, 264, 640, BLOCK_128).check_linear(planted)
    Call(m, 264, 1040, ROW, bias_dtype=torch.float32).check_linear(planted)
    assert fake_cutlass.CALLS.names == ["groupwise", "rowwise"]


def test_the_real_names() -> None:
    assert (Mslk.namespace, Mslk.module, Mslk.other_namespace) == ("mslk", "mslk", "fbgemm")
