"""FBGEMM: a test per refusal, and the adapter over operators that read memory as it lies."""

from __future__ import annotations

import logging
import subprocess
import sys
import types

import pytest
import torch

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.fbgemm import BACKEND, Fbgemm
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.machine import Machine
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR
from tests.backends import fake_cutlass
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

DIST = "fbgemm-gpu-genai"
FITS = f"{DIST} (pip install {DIST}==1.6.0)"
NONE_FITS = f"{DIST} (no release of {DIST} is known to load with torch "
A_GPU = "capability: needs a CUDA device of capability 9.0 or 10.0"
CONSUMER = f"{A_GPU} (consumer chips are given the kernels of 9.0, which do not run there)"


def genai(version: str | None, torch_version: str = "2.11.0", machine: Machine = H200) -> Machine:
    return having(machine, fbgemm_gpu_genai=version, torch=torch_version)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (H200, []),
        (B200, []),
        (genai("1.5.0", "2.10.0+cu130"), []),
        (genai("1.9.0rc1", "2.14.0.dev20260901"), []),
        (genai("2025.8.20+cu128", "2.9.0"), []),  # a nightly: loading it tells
        (having(genai(None), fbgemm_gpu_genai_nightly="2026.9.21"), []),
        (genai("1.17.0"), []),  # later than what is known here
        (genai(None), [f"version: needs {FITS}, found none"]),
        (genai(None, "2.20.0"), [f"version: needs {NONE_FITS}2.20.0), found none"]),
        (
            having(genai(None), fbgemm_gpu="1.6.0"),
            [
                f"distribution: needs {FITS}, found only fbgemm-gpu 1.6.0, which carries no FP8 "
                f"GEMMs since 1.2.0"
            ],
        ),
        (
            genai("1.5.0"),
            [
                f"torch: needs torch 2.10, the one that {DIST} 1.5.0 loads with, or {FITS}, found "
                f"torch 2.11.0"
            ],
        ),
        (
            genai("1.6.0+cu130", "2.1.0"),
            [
                f"torch: needs torch 2.11, the one that {DIST} 1.6.0+cu130 loads with, or "
                f"{NONE_FITS}2.1.0), found torch 2.1.0"
            ],
        ),
        (genai("1.1.2"), [f"version: needs {FITS}, found {DIST} 1.1.2"]),
        (genai("INTERNAL"), [f"version: needs a readable version of {DIST}, found INTERNAL"]),
        (L40S, [f"{CONSUMER}, found {L40S}"]),
        (RTX_5090, [f"{CONSUMER}, found {RTX_5090}"]),
        (GB10, [f"{CONSUMER}, found {GB10}"]),
        (A100, [f"{A_GPU}, found {A100}"]),
        (B300, [f"{A_GPU}, found {B300}"]),
        (CPU, [f"{A_GPU}, found cpu"]),
        (
            MI300X,
            [
                f"rocm: needs an NVIDIA GPU (its ROCm builds are other kernels), found ROCm on "
                f"{MI300X}"
            ],
        ),
    ],
)
def test_machine(machine: Machine, expected: list[str]) -> None:
    assert told(BACKEND.refuse_machine(machine)) == expected


BIAS = (
    "bias: needs no bias with block scales (added to its bfloat16 product it would be rounded "
    "twice: use a backend that fuses it, or add it outside), found one"
)
HOPPER_ONLY = "capability: needs capability 9.0 for block scales (elsewhere they return uncomputed)"


@pytest.mark.parametrize(
    ("problem", "machine", "expected"),
    [
        (blocks(), H200, []),
        (rows(), H200, []),
        (rows(recipe=TENSOR, static_activation=True, has_bias=True), H200, []),
        (rows(has_bias=True, accuracy=Accuracy.FAST), B200, []),
        (rows(), genai("1.3.0", "2.8.0"), []),
        (blocks(), genai("2024.1.1"), []),
        (blocks(has_bias=True), H200, [BIAS]),
        (blocks(recipe=GROUPS), H200, ["block-size: needs blocks 128x128, found block 1x128"]),
        (blocks(), B200, [f"{HOPPER_ONLY}, found {B200}"]),
        (
            blocks(),
            genai("1.3.0", "2.8.0"),
            [f"version: needs {DIST} >= 1.4 for right block scales, found {DIST} 1.3.0"],
        ),
        (
            rows(),
            genai("1.4.2", "2.9.0", B200),
            [f"version: needs {DIST} >= 1.5 for capability 10.0, found {DIST} 1.4.2"],
        ),
        (
            blocks(k=7184),
            H200,
            ["align-k: needs K a multiple of 128 with block scales, found K=7184"],
        ),
        (rows(k=7160), H200, ["align-k: needs K a multiple of 16, found K=7160"]),
        (rows(n=4097), H200, ["align-n: needs N a multiple of 8, found N=4097"]),
        (
            rows(out_dtype="float16"),
            H200,
            ["out-dtype: needs out dtype bfloat16, found float16"],
        ),
        (
            rows(weight_dtype="float8_e5m2"),
            H200,
            ["weight-dtype: needs weight dtype float8_e4m3fn, found float8_e5m2"],
        ),
        (
            rows(weight_row_major=False),
            H200,
            ["layout: needs a row-major weight [N, K], found other strides"],
        ),
        (
            rows(weight_contiguous=False),
            H200,
            [
                "contiguous: needs a contiguous weight (make it contiguous once), found gaps "
                "between its rows"
            ],
        ),
        (
            rows(aligned=False),
            H200,
            ["alignment: needs weight memory aligned to 16 bytes, found an odd address"],
        ),
        (
            rows(m=2**31 // 7168 + 1),
            H200,
            [
                "size: needs M x K below 2**31 elements (32-bit offsets), found 2147489792",
            ],
        ),
    ],
)
def test_problem(problem: LinearProblem, machine: Machine, expected: list[str]) -> None:
    assert told(BACKEND.refuse_problem(problem, machine)) == expected


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Fbgemm:
    backend = fake_cutlass.plant(Fbgemm, monkeypatch)
    assert isinstance(backend, Fbgemm)
    return backend


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (264, 640), (8, 128), (136, 256)])
@pytest.mark.parametrize("m", [1, 3, 4, 130])
def test_blocks(m: int, n: int, k: int, static: bool, planted: Fbgemm) -> None:
    call = Call(m, n, k, BLOCK_128, static=static)
    call.check_linear(planted)
    call.check_matmul(planted)
    assert set(fake_cutlass.CALLS.names) == {"groupwise"}


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("recipe", [TENSOR, ROW], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 256, 512), (3, 264, 1040), (130, 8, 336)])
def test_rows(
    m: int, n: int, k: int, recipe: object, static: bool, bias: torch.dtype | None, planted: Fbgemm
) -> None:
    assert recipe in (TENSOR, ROW)
    call = Call(m, n, k, TENSOR if recipe == TENSOR else ROW, bias_dtype=bias, static=static)
    call.check_linear(planted)
    call.check_matmul(planted)
    assert set(fake_cutlass.CALLS.names) == {"rowwise"}
    assert set(fake_cutlass.CALLS.fast) == {False}, "exact unless the policy allows less"
    # In bf16 it would round the product before it adds the bias.
    assert set(fake_cutlass.CALLS.bias_dtypes) == {None if bias is None else torch.float32}


def test_fast_accumulation_is_the_policys(planted: Fbgemm) -> None:
    Call(3, 256, 512, ROW, accuracy=Accuracy.FAST).check_linear(planted)
    assert fake_cutlass.CALLS.fast == [True]


def test_a_bias_at_an_odd_address_is_moved(planted: Fbgemm) -> None:
    call = Call(3, 256, 512, ROW, bias_dtype=torch.bfloat16)
    call.bias = torch.randn(257).to(torch.bfloat16)[1:]
    call.check_linear(planted)


@pytest.mark.parametrize(
    "scale", [torch.ones(3, 4), torch.ones(2, 4, dtype=torch.float64), torch.ones(4, 2)]
)
def test_a_wrong_scale_never_reaches_the_library(scale: torch.Tensor, planted: Fbgemm) -> None:
    call = Call(4, 256, 512, BLOCK_128)
    weight = Weight(call.data, scale, BLOCK_128, scale)
    with pytest.raises(RuntimeError, match=r"the weight scales must be contiguous \[4, 2\]"):
        planted.linear(call.x, weight, None, None, call.problem)
    assert fake_cutlass.CALLS.names == []


def test_an_operator_without_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = fake_cutlass.plant(Fbgemm, monkeypatch, cuda=False)
    module = backend.module
    for recipe, name in ((ROW, "rowwise"), (BLOCK_128, "groupwise")):
        assert told(backend.loadable(recipe)) == [
            f"operator: needs a CUDA kernel of torch.ops.{module}.f8f8bf16_{name}, found none "
            f"after importing {module}"
        ]
    with pytest.raises(BackendUnavailableError, match=r"fbgemm needs a CUDA kernel .*; exclude"):
        Call(1, 8, 128, BLOCK_128).check_linear(backend)


def test_a_release_with_one_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = fake_cutlass.plant(Fbgemm, monkeypatch, groupwise=False)
    assert backend.loadable(ROW) == ()
    assert [reason.code for reason in backend.loadable(BLOCK_128)] == ["operator"]


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[str] = []

    def load(name: str) -> types.ModuleType:
        attempts.append(name)
        logging.warning("noise at import")
        cause = OSError("libfoo.so: undefined symbol: _ZN3c10\nmore")
        raise OSError("Could not load this library: libfoo.so") from cause

    monkeypatch.setattr("fp8dispatch.backends.fbgemm_family.import_module", load)
    backend = Fbgemm()
    for _ in range(2):
        assert told(backend.loadable(ROW)) == [
            f"import: needs {DIST} to load into this torch, found OSError: Could not load this "
            f"library: libfoo.so (OSError: libfoo.so: undefined symbol: _ZN3c10)"
        ]
    assert attempts == ["fbgemm_gpu.experimental.gen_ai"], "tried once"


def test_out_of_memory_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> types.ModuleType:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("fp8dispatch.backends.fbgemm_family.import_module", load)
    with pytest.raises(torch.OutOfMemoryError):
        Fbgemm().loadable(ROW)


def test_an_import_does_not_configure_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])

    def load(name: str) -> types.ModuleType:
        logging.warning("what FBGEMM does at import")
        return types.ModuleType(name)

    monkeypatch.setattr("fp8dispatch.backends.fbgemm_family.import_module", load)
    Fbgemm().loadable(ROW)

    assert root.handlers == []


def test_the_second_of_two_libraries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = fake_cutlass.plant(Fbgemm, monkeypatch)
    other = "fp8dispatch_fake_other"
    fake_cutlass.define(other)
    monkeypatch.setattr(type(backend), "other_namespace", other)
    assert told(backend.loadable(ROW)) == [
        f"loaded: needs a process without torch.ops.{other} (both libraries register the same "
        f"operators), found torch.ops.{other}.f8f8bf16_rowwise"
    ]


def test_the_real_names() -> None:
    assert (Fbgemm.namespace, Fbgemm.module) == ("fbgemm", "fbgemm_gpu.experimental.gen_ai")
    assert Fbgemm.accuracies == {Accuracy.EXACT, Accuracy.FAST}


def test_the_backends_import_no_library() -> None:
    libraries = "{'fbgemm_gpu', 'mslk', 'torchao', 'deep_gemm', 'triton'}"
    code = (
        f"import sys; from fp8dispatch.backends import deepgemm, fbgemm, mslk, torchao; "
        f"print({libraries} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("machine", "verified"),
    [
        (H200, True),
        (B200, False),  # another chip
        (having(H200, fbgemm_gpu_genai="1.6.1+cu130"), False),  # another release
        (having(H200, fbgemm_gpu_genai=None, fbgemm_gpu_genai_nightly="2026.9.21"), False),
    ],
)
def test_only_the_release_that_was_seen_to_run_is_run_in_this_process_at_once(
    machine: Machine, verified: bool
) -> None:
    assert BACKEND.is_verified(machine) is verified
