"""The tile-wise GEMMs of FBGEMM and MSLK, over operators that look at what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.eager import Eager
from fp8dispatch.backends.fbgemm import Fbgemm
from fp8dispatch.backends.fbgemm_tile import BACKEND, FbgemmTile, TileScales
from fp8dispatch.backends.mslk_tile import BACKEND as MSLK_TILE
from fp8dispatch.backends.mslk_tile import MslkTile
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.machine import Machine
from fp8dispatch.probes.numerics import CanaryResult, run_canary
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation
from fp8dispatch.recipe import BLOCK_128, Granularity
from tests.backends import fake_cutlass
from tests.backends.cases import (
    B200,
    CPU,
    GROUPS,
    H200,
    MI300X,
    RTX_5090,
    Call,
    blocks,
    having,
    rows,
    told,
)

E4M3 = torch.float8_e4m3fn
A_GPU = "capability: needs a CUDA device of capability 9.0"
CONSUMER = "(consumer chips are given the kernels of 9.0, which do not run there)"
FITS = "fbgemm-gpu-genai (pip install fbgemm-gpu-genai==1.6.0)"


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (H200, []),
        (B200, [f"{A_GPU}, found {B200}"]),  # unlike the row-wise kernel of the same library
        (RTX_5090, [f"{A_GPU} {CONSUMER}, found {RTX_5090}"]),
        (CPU, [f"{A_GPU}, found cpu"]),
        (
            MI300X,
            [
                f"rocm: needs an NVIDIA GPU (its ROCm builds are other kernels), found ROCm on "
                f"{MI300X}"
            ],
        ),
        (having(H200, fbgemm_gpu_genai=None), [f"version: needs {FITS}, found none"]),
    ],
)
def test_machine(machine: Machine, expected: list[str]) -> None:
    assert told(BACKEND.refuse_machine(machine)) == expected


def test_each_needs_its_own_library() -> None:
    assert MSLK_TILE.refuse_machine(having(H200, fbgemm_gpu_genai=None)) == ()
    (reason,) = MSLK_TILE.refuse_machine(having(H200, mslk_cuda=None))
    assert str(reason) == "needs mslk-cuda (pip install mslk-cuda==1.1.0), found none"
    for backend in (BACKEND, MSLK_TILE):
        assert backend.is_verified(H200) is (backend is BACKEND), "MSLK's nobody has seen run"
        assert backend.namespace == backend.name.removesuffix("_tile")


@pytest.mark.parametrize(
    ("problem", "machine", "expected"),
    [
        (blocks(), H200, []),
        (blocks(n=264, k=1040), H200, []),
        (blocks(accuracy=Accuracy.FAST), H200, []),
        (rows(), H200, ["recipe: needs a block recipe, found row"]),
        (blocks(recipe=GROUPS), H200, ["block-size: needs blocks 128x128, found block 1x128"]),
        (
            blocks(static_activation=True),
            H200,
            [
                "static: needs dynamic activations, which it scales in 128x128 tiles, found one "
                "static activation scale"
            ],
        ),
        (
            blocks(has_bias=True),
            H200,
            [
                "bias: needs no bias with block scales (added to its bfloat16 product it would be "
                "rounded twice: use a backend that fuses it, or add it outside), found one"
            ],
        ),
        (
            blocks(),
            having(H200, fbgemm_gpu_genai="1.3.0", torch="2.8.0"),
            [
                "version: needs fbgemm-gpu-genai >= 1.4 for right block scales, found "
                "fbgemm-gpu-genai 1.3.0"
            ],
        ),
        (blocks(k=7160), H200, ["align-k: needs K a multiple of 16, found K=7160"]),
        (blocks(n=4100), H200, ["align-n: needs N a multiple of 8, found N=4100"]),
        (blocks(out_dtype="float32"), H200, ["out-dtype: needs out dtype bfloat16, found float32"]),
        (
            blocks(weight_row_major=False, aligned=False),
            H200,
            [
                "layout: needs a row-major weight [N, K], found other strides",
                "alignment: needs weight memory aligned to 16 bytes, found an odd address",
            ],
        ),
        (
            blocks(weight_contiguous=False),
            H200,
            [
                "contiguous: needs a contiguous weight (make it contiguous once), found gaps "
                "between its rows"
            ],
        ),
    ],
)
def test_problem(problem: LinearProblem, machine: Machine, expected: list[str]) -> None:
    assert told(BACKEND.refuse_problem(problem, machine)) == expected


@pytest.fixture(params=[FbgemmTile, MslkTile])
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TileScales:
    backend = fake_cutlass.plant(request.param, monkeypatch)
    assert isinstance(backend, TileScales)
    return backend


@pytest.mark.parametrize(("n", "k"), [(256, 512), (264, 656), (8, 128), (136, 272)])
@pytest.mark.parametrize("m", [1, 3, 127, 128, 129, 300])
def test_numbers(m: int, n: int, k: int, planted: TileScales) -> None:
    call = Call(m, n, k, BLOCK_128, rows_per_scale=128)
    call.x[128:256, :128] = 0  # a tile of zeros, where there are so many rows
    call.check_linear(planted)
    call.check_matmul(planted)
    assert set(fake_cutlass.CALLS.names) == {"blockwise"}


def test_a_weight_scale_at_an_odd_address_is_moved(planted: TileScales) -> None:
    call = Call(5, 256, 512, BLOCK_128, rows_per_scale=128)
    odd = torch.zeros(9)[1:].view(2, 4).copy_(call.weight.scale)
    call.weight = call.weight._replace(scale=odd)
    call.check_linear(planted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_row_stays_alone(value: float, planted: TileScales) -> None:
    call = Call(260, 264, 512, BLOCK_128, rows_per_scale=128)
    call.x[5] = 0
    arguments = (call.weight, None, None, call.problem)
    clean = planted.linear(call.x, *arguments)
    call.x[5, 300], call.x[5, 7] = value, 1e30
    dirty = planted.linear(call.x, *arguments)

    assert not torch.isfinite(dirty[5]).any()
    assert torch.equal(torch.cat([dirty[:5], dirty[6:]]), torch.cat([clean[:5], clean[6:]]))


@pytest.mark.parametrize("m", [3, 128, 130])
def test_scales_of_each_token_are_refused(m: int, planted: TileScales) -> None:
    call = Call(m, 256, 512, BLOCK_128)
    with pytest.raises(BackendUnavailableError) as caught:
        call.check_matmul(planted)
    assert str(caught.value) == (
        f"{planted.name} needs activations that it quantises itself, with one scale per 128x128 "
        f"tile [{-(-m // 128)}, 4], found scales [{m}, 4]; pass the unquantised X to fp8_linear, "
        f"or take another backend"
    )
    assert fake_cutlass.CALLS.names == []


def test_a_static_scale_is_refused_where_the_problem_cannot_say_so(planted: TileScales) -> None:
    """With one row, one scale for all is no sign of a static one."""
    call = Call(1, 256, 512, BLOCK_128)
    x = QuantizedActivation(call.x.to(E4M3), torch.ones(1, 1))
    with pytest.raises(BackendUnavailableError, match=r"tile \[1, 4\], found scales \[1, 1\]"):
        planted.matmul(x, call.weight, None, call.problem)


def test_one_row_is_a_tile_of_its_own(planted: TileScales) -> None:
    """Whose scales are then the same as those of its token."""
    call = Call(1, 256, 512, BLOCK_128)
    call.check_matmul(planted)
    call.check_linear(planted)


def test_a_wrong_weight_scale_never_reaches_the_library(planted: TileScales) -> None:
    call = Call(4, 256, 512, BLOCK_128)
    weight = Weight(call.data, torch.ones(4, 2), BLOCK_128, call.scale)
    with pytest.raises(RuntimeError, match=r"the weight scales must be contiguous \[2, 4\]"):
        planted.linear(call.x, weight, None, None, call.problem)
    assert fake_cutlass.CALLS.names == []


def test_a_release_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = fake_cutlass.plant(FbgemmTile, monkeypatch, cuda=False)
    assert told(backend.loadable(BLOCK_128)) == [
        f"operator: needs a CUDA kernel of torch.ops.{backend.module}.f8f8bf16_blockwise, found "
        f"none after importing {backend.module}"
    ]


def canary(backend: TileScales, monkeypatch: pytest.MonkeyPatch) -> CanaryResult:
    """On the CPU, which the stand-in runs on."""
    monkeypatch.setattr(type(backend), "refuse_machine", lambda *_: ())
    return run_canary(backend, torch.device("cpu"), BLOCK_128)


def test_the_canary_is_right(planted: TileScales, monkeypatch: pytest.MonkeyPatch) -> None:
    result = canary(planted, monkeypatch)
    assert result.right, result.reason
    assert len(fake_cutlass.CALLS.names) == 4  # two numbers of rows, on both entries


Change = Callable[[torch.Tensor], torch.Tensor]
SCALE_FAULTS: dict[str, tuple[int, Change]] = {
    "activation tiles transposed": (2, lambda scale: scale.t().reshape(scale.shape)),
    "activation tiles of the first rows": (2, lambda scale: scale[:1].expand_as(scale)),
    "activation tiles reciprocal": (2, lambda scale: 1 / scale),
    "activation tiles rounded": (2, lambda scale: torch.exp2(scale.log2().ceil())),
    "weight scales transposed": (3, lambda scale: scale.t().reshape(scale.shape)),
    "weight scales rounded": (3, lambda scale: torch.exp2(scale.log2().ceil())),
}


@pytest.mark.parametrize("fault", SCALE_FAULTS)
def test_the_canary_catches_a_kernel_that_misreads_scales(
    fault: str, planted: TileScales, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, change = SCALE_FAULTS[fault]
    assert planted.loadable(BLOCK_128) == ()
    real = planted._ops["f8f8bf16_blockwise"]

    def misreading(*operands: Any) -> torch.Tensor:
        changed = change(operands[index]).contiguous()
        return real(*operands[:index], changed, *operands[index + 1 :])

    monkeypatch.setitem(planted._ops, "f8f8bf16_blockwise", misreading)
    result = canary(planted, monkeypatch)
    assert result.applicable
    assert not result.right


def test_the_canary_catches_the_other_recipe(
    planted: TileScales, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scale for each token and 128 columns, where tiles are declared."""

    def by_token(x: torch.Tensor, weight: Weight, bias: Any, static: Any, problem: Any) -> Any:
        quantized = quantize_activation(x, 128, E4M3, use_kernels=False)
        return Eager().matmul(quantized, weight, bias, problem)

    monkeypatch.setattr(planted, "linear", by_token)
    result = canary(planted, monkeypatch)
    assert not result.right
    assert result.reason.startswith("linear with")


def test_rows_and_groups_of_the_library_are_as_they_were() -> None:
    assert Fbgemm.rows_per_scale == 1
    assert Fbgemm.opt_in == ""
    assert Fbgemm.block_operator == "f8f8bf16_groupwise"
    assert Fbgemm.recipes == frozenset(Granularity)
