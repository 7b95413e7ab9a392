"""FBGEMM's and MSLK's grouped GEMMs: a test per refusal, and the adapter over their memory."""

from __future__ import annotations

import math

import pytest
import torch

from fp8dispatch import BackendUnavailableError, registry
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.moe.backends.fbgemm import Fbgemm
from fp8dispatch.moe.backends.fbgemm_family import FbgemmFamilyExperts
from fp8dispatch.moe.backends.mslk import Mslk
from fp8dispatch.problem import Accuracy
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle
from tests.backends.cases import A100, B200, CPU, GB10, H200, MI300X, having, told
from tests.moe import fake_grouped
from tests.moe.cases import WAYS, make_call
from tests.moe.library import BIAS, CONTIGUOUS, STATIC, routed, run

FAMILY = (Fbgemm, Mslk)
FAST = Accuracy.FAST
HOPPER = "capability: needs a CUDA device of capability 9.0"
CONSUMER = f"{HOPPER} (consumer chips are given the kernels of 9.0, which do not run there)"
BLOCK_BIAS = (
    "bias: needs no bias with block scales (added to its bfloat16 product it would be rounded "
    "twice: use a backend that fuses it, or add it outside), found one"
)
EXACT_ROWS = (
    "accuracy: needs a policy that allows fast accumulation with per-row and per-tensor scales, "
    "found exact"
)
OLD = "version: needs fbgemm-gpu-genai >= 1.4 for its grouped GEMMs, found fbgemm-gpu-genai 1.3.0"
GROUPS = Recipe(Granularity.BLOCK, (1, 128))


@pytest.fixture(params=FAMILY, ids=[one.name for one in FAMILY])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FbgemmFamilyExperts:
    return fake_grouped.plant_family(request.param, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("static", ["none", "one"])
@pytest.mark.parametrize("recipe", [BLOCK_128, ROW, TENSOR], ids=str)
def test_rows_reach_their_places_and_come_back(
    backend: FbgemmFamilyExperts, recipe: Recipe, way: str, static: str
) -> None:
    n, k = (256, 384) if recipe == BLOCK_128 else (136, 144)
    call = make_call(way, recipe, 4, n, k, 50, static=static)

    oracle.assert_matches(run(backend, call, FAST), call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize("recipe", [BLOCK_128, ROW], ids=str)
@pytest.mark.parametrize(("rows", "experts"), [(1, 5), (9, 40), (130, 1)])
def test_any_number_of_rows_and_experts(
    backend: FbgemmFamilyExperts, recipe: Recipe, rows: int, experts: int
) -> None:
    for sentinels, concentrated in ((0.0, True), (0.5, False), (1.1, False)):
        call = make_call(
            "grouped", recipe, experts, 128, 256, rows,
            sentinels=sentinels, concentrated=concentrated,
        )  # fmt: skip
        oracle.assert_matches(run(backend, call, FAST), call.truth(), min_sqnr=-math.inf)


def test_no_input_gives_zeros(backend: FbgemmFamilyExperts) -> None:
    call = make_call("batched-gather", BLOCK_128, 3, 128, 128, 4)
    call.arguments["x"] = call.arguments["x"][:0]

    assert not run(backend, call).any()


def test_a_second_call_copies_no_scales(
    backend: FbgemmFamilyExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the weight's scales is made once, and made anew when they change."""
    call = make_call("grouped", BLOCK_128, 3, 256, 256, 20)
    first = run(backend, call)
    copies: list[torch.Tensor] = []
    clone = torch.Tensor.clone

    def counting(tensor: torch.Tensor, *args: object, **named: object) -> torch.Tensor:
        copies.append(tensor)
        return clone(tensor, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "clone", counting)
    assert torch.equal(run(backend, call), first)
    assert copies == []
    call.arguments["weight_scale"].mul_(2)
    assert torch.equal(run(backend, call), first * 2)


@pytest.mark.parametrize("base", FAMILY)
def test_a_release_without_the_block_operator_is_refused(
    base: type[FbgemmFamilyExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = fake_grouped.plant_family(base, monkeypatch, blocks=False)

    assert planted.loadable(ROW) == ()
    with pytest.raises(BackendUnavailableError, match=r"f8f8bf16_groupwise_grouped, found none"):
        run(planted, make_call("grouped", BLOCK_128, 3, 128, 128, 6))


@pytest.mark.parametrize("base", FAMILY)
def test_a_library_that_does_not_import_is_refused(
    base: type[FbgemmFamilyExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = Refusal("import", "to load", "OSError: libnccl.so.2")
    monkeypatch.setattr(base.linear, "_load_refusals", (reason,))

    assert base().loadable(BLOCK_128) == (reason,)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (H200, []),
        (B200, [f"{HOPPER}, found {B200}"]),
        (A100, [f"{HOPPER}, found {A100}"]),
        (GB10, [f"{CONSUMER}, found {GB10}"]),
        (CPU, [f"{HOPPER}, found cpu"]),
        (MI300X, ["rocm: needs an NVIDIA GPU (its ROCm builds are other kernels), found ROCm on "
                  f"{MI300X}"]),
        (
            having(H200, fbgemm_gpu_genai="1.5.0"),
            ["torch: needs torch 2.10, the one that fbgemm-gpu-genai 1.5.0 loads with, or "
             "fbgemm-gpu-genai (pip install fbgemm-gpu-genai==1.6.0), found torch 2.11.0+cu130"],
        ),
    ],
)  # fmt: skip
def test_machine(machine: Machine, expected: list[str]) -> None:
    assert told(Fbgemm().refuse_machine(machine)) == expected


@pytest.mark.parametrize(
    ("problem", "machine", "expected"),
    [
        (routed(), H200, []),
        (routed(ROW, accuracy=FAST), H200, []),
        (routed(TENSOR, accuracy=FAST, static_activation=True, n=136, k=144), H200, []),
        (routed(accuracy=FAST, batched=True, gathers=True), H200, []),
        (routed(ROW), H200, [EXACT_ROWS]),
        (routed(GROUPS), H200, ["block-size: needs blocks 128x128, found block 1x128"]),
        (routed(has_bias=True), H200, [BLOCK_BIAS]),
        (routed(ROW, accuracy=FAST, has_bias=True), H200, [BIAS]),
        (routed(static_activation=True, static_per_expert=True), H200, [STATIC]),
        (routed(weight_contiguous=False), H200, [CONTIGUOUS]),
        (
            routed(aligned=False),
            H200,
            ["alignment: needs weight memory aligned to 16 bytes, found an odd address"],
        ),
        (
            routed(experts=1025),
            H200,
            ["experts: needs at most 1024 experts (one thread of a block prepares each), found "
             "1025"],
        ),
        (
            routed(n=4168),
            H200,
            ["align-n: needs N a multiple of 128 with block scales, found N=4168"],
        ),
        (
            routed(k=7184),
            H200,
            ["align-k: needs K a multiple of 128 with block scales, found K=7184"],
        ),
        (
            routed(ROW, accuracy=FAST, n=4100, k=7160),
            H200,
            ["align-n: needs N a multiple of 8, found N=4100",
             "align-k: needs K a multiple of 16, found K=7160"],
        ),
        (
            routed(out_dtype="float16"),
            H200,
            ["out-dtype: needs out dtype bfloat16, found float16"],
        ),
        (
            routed(weight_dtype="float8_e5m2"),
            H200,
            ["weight-dtype: needs weight dtype float8_e4m3fn, found float8_e5m2"],
        ),
        (
            routed(m=299_500),
            H200,
            ["size: needs padded rows below 2**31 elements (32-bit offsets), found 299620 rows of "
             "7168"],
        ),
        (routed(), having(H200, fbgemm_gpu_genai="1.3.0"), [OLD]),
        (routed(ROW, accuracy=FAST), having(H200, fbgemm_gpu_genai="1.3.0"), [OLD]),
    ],
)  # fmt: skip
def test_call(problem: object, machine: Machine, expected: list[str]) -> None:
    assert told(Fbgemm().refuse_problem(problem, machine)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "verified"), [("fbgemm", True), ("mslk", False)])
def test_which_of_the_two_has_been_seen_to_run(name: str, verified: bool) -> None:
    backend = registry.load_experts(name)

    assert backend.name == name
    assert backend.refuse_machine(H200) == ()
    assert backend.is_verified(H200) is verified
    assert not backend.is_verified(having(H200, fbgemm_gpu_genai="1.5.0", mslk_cuda="1.0.0"))
