"""Routing: the first backend that refuses nothing runs, and every refusal is kept as a sentence.

A decision reads plain data alone, so every machine in the world is a dataclass here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import explain, fp8_linear, policy, registry, routes
from fp8dispatch.backends.cublaslt import CuBlasLt
from fp8dispatch.backends.eager import Eager
from fp8dispatch.backends.triton import Triton
from fp8dispatch.errors import (
    BackendUnavailableError,
    ConfigurationError,
    Refusal,
)
from fp8dispatch.machine import Machine
from fp8dispatch.policy import Policy
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from fp8dispatch.router import Decision, Standing, select

if TYPE_CHECKING:
    from collections.abc import Iterator


def block(rows: int, columns: int) -> Recipe:
    return Recipe(Granularity.BLOCK, (rows, columns))


VERSIONS = {"torch": "2.11.0+cu130", "triton": "3.6.0", "cuda": "13.0"}
H100 = Machine("cuda", "NVIDIA H100", (9, 0), VERSIONS)
H100_NO_GLUON = replace(H100, versions={**VERSIONS, "triton": "3.5.1"})
A100 = Machine("cuda", "NVIDIA A100", (8, 0), VERSIONS)
RTX_4090 = Machine("cuda", "NVIDIA GeForce RTX 4090", (8, 9), VERSIONS)
B200 = Machine("cuda", "NVIDIA B200", (10, 0), VERSIONS)
V100 = Machine("cuda", "NVIDIA V100", (7, 0), VERSIONS)
FUTURE = Machine("cuda", "NVIDIA R100", (13, 0), VERSIONS)
CPU = Machine("cpu", "cpu", None, {"torch": "2.13.0+cpu"})
INTERPRETER = Machine("cpu", "cpu", None, {"torch": "2.13.0", "triton": "3.9.0"}, True)
ROCM = Machine(  # calls itself cuda, with a capability that NVIDIA has too
    "cuda", "AMD Radeon RX 9070", (12, 0), {"torch": "2.11.0", "triton": "3.6.0", "hip": "7.0"}
)

BLOCK = LinearProblem(17, 4096, 7168, BLOCK_128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16", True)
rows, blocks = partial(replace, replace(BLOCK, recipe=ROW)), partial(replace, BLOCK)
ROWS = rows()
ONE_SCALE = blocks(recipe=TENSOR)
STATIC = replace(ONE_SCALE, static_activation=True)
GROUPS = blocks(recipe=block(1, 128))
E5M2 = "float8_e5m2"
FNUZ = "float8_e4m3fnuz"
ANYTHING = Policy()


def without(machine: Machine, name: str) -> Machine:
    return replace(machine, versions={k: v for k, v in machine.versions.items() if k != name})


def having(machine: Machine, **versions: str) -> Machine:
    return replace(machine, versions={**machine.versions, **versions})


def route(problem: LinearProblem, machine: Machine, allowed: Policy = ANYTHING) -> Decision:
    """The decision of the real backends in their real order."""
    names, source = routes.order_for(problem, machine, registry.NAMES)
    return select(problem, machine, allowed, names, registry.load, route=source)


def order_of(decision: Decision) -> tuple[str, ...]:
    return tuple(one.backend for one in decision.assessments)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment that says nothing; read again after every `reload_environment`."""
    monkeypatch.delenv(policy.BACKEND_VARIABLE, raising=False)
    monkeypatch.delenv(policy.ACCURACY_VARIABLE, raising=False)
    policy.reload_environment()
    yield monkeypatch
    policy.reload_environment()


@pytest.mark.parametrize(
    ("machine", "problem", "chosen"),
    [
        (H100, BLOCK, "gluon"),
        (H100, ROWS, "gluon"),
        (H100, rows(m=4096, n=37_632), "cublaslt"),  # as many tiles as only large models have
        (H100, ONE_SCALE, "gluon"),
        (H100, replace(STATIC, out_dtype="float32"), "gluon"),
        (H100, blocks(out_dtype="float32"), "gluon"),
        (H100, blocks(n=4095), "gluon"),
        (H100, GROUPS, "cublaslt"),
        (H100, blocks(k=7160), "triton"),
        (H100, blocks(weight_dtype=FNUZ), "triton"),
        (having(H100, cuda="12.8"), BLOCK, "gluon"),
        (having(H100, cuda="12.8"), GROUPS, "triton"),
        (H100_NO_GLUON, BLOCK, "triton"),
        (H100_NO_GLUON, ROWS, "triton"),
        (H100_NO_GLUON, blocks(m=600), "cublaslt"),
        (H100_NO_GLUON, rows(m=600), "cublaslt"),
        (H100_NO_GLUON, blocks(m=600, n=4095), "triton"),
        (having(H100_NO_GLUON, cuda="12.8"), blocks(m=600), "triton"),
        (having(H100_NO_GLUON, cuda="12.8"), rows(m=600), "cublaslt"),
        (having(H100_NO_GLUON, torch="2.9.1"), rows(m=600), "triton"),
        (without(H100, "triton"), BLOCK, "cublaslt"),
        (without(H100, "triton"), blocks(k=7000), "eager"),
        (RTX_4090, BLOCK, "triton"),
        (RTX_4090, ROWS, "cublaslt"),
        (B200, BLOCK, "triton"),
        (B200, ROWS, "cublaslt"),
        (A100, BLOCK, "triton"),
        (without(A100, "triton"), ROWS, "eager"),
        (V100, ROWS, "eager"),
        (FUTURE, ROWS, "eager"),
        (ROCM, ROWS, "eager"),
        (CPU, BLOCK, "eager"),
        (INTERPRETER, BLOCK, "eager"),
    ],
)
def test_default_route(machine: Machine, problem: LinearProblem, chosen: str) -> None:
    decision = route(problem, machine)

    assert decision.backend == chosen
    assert decision.decided_by == "default"
    assert sorted(order_of(decision)) == sorted(registry.NAMES), "every backend was asked"
    asked_first = order_of(decision)[: order_of(decision).index(chosen)]
    assert set(asked_first) <= {name for name, _ in decision.refusals}


def told(refusals: tuple[Refusal, ...]) -> list[str]:
    """Refusals as ``code: sentence``."""
    return [f"{refusal.code}: {refusal}" for refusal in refusals]


A_GPU = "capability: needs a CUDA device of capability 8.9, 9.0, 10.0, 10.3, 12.0, 12.1, found "
TRITON_GPU = A_GPU.replace("8.9", "8.0, 8.6, 8.7, 8.9")
TRITON = (
    "version: needs triton >= 3.4 (CUDA builds of torch bring it; elsewhere: pip install "
    "'fp8dispatch[triton]'), found "
)
TORCH = "version: needs torch >= 2.10, found "
FORMATS = "needs weight dtype float8_e4m3fn or float8_e5m2"
OUTPUTS = "needs out dtype bfloat16 or float16 or float32"
LAYOUT = "needs a row-major weight [N, K]"
ALIGNED = "needs weight memory aligned to 16 bytes"
BLOCK_FORMAT = "needs float8_e4m3fn weights with blocks"
SIZES = "needs blocks 128x128 or 1x128"
CUDA = "cuda: needs torch built with CUDA >= 12.9 for block scales, found "


@pytest.mark.parametrize(
    ("backend", "machine", "expected"),
    [
        (CuBlasLt, H100, []),
        (CuBlasLt, RTX_4090, []),
        (CuBlasLt, having(H100, torch="2.10.0a0+git123"), []),  # a nightly of the release
        (CuBlasLt, having(H100, torch="2.9.1"), [TORCH + "2.9.1"]),
        (CuBlasLt, having(H100, torch="2.2"), [TORCH + "2.2"]),  # not compared as text
        (CuBlasLt, without(H100, "torch"), [TORCH + "none"]),
        (CuBlasLt, having(H100, torch="odd"), [TORCH + "odd"]),
        (CuBlasLt, A100, [A_GPU + "NVIDIA A100 (capability 8.0)"]),
        (CuBlasLt, FUTURE, [A_GPU + "NVIDIA R100 (capability 13.0)"]),
        (CuBlasLt, CPU, [A_GPU + "cpu"]),
        (CuBlasLt, ROCM, [A_GPU + "ROCm on AMD Radeon RX 9070 (capability 12.0)"]),
        (CuBlasLt, having(CPU, torch="2.9"), [TORCH + "2.9", A_GPU + "cpu"]),
        (Triton, H100, []),
        (Triton, A100, []),
        (Triton, INTERPRETER, []),
        (Triton, having(H100, triton="3.10.0"), []),
        (Triton, without(H100, "triton"), [TRITON + "none"]),
        (Triton, having(H100, triton="3.3.1"), [TRITON + "3.3.1"]),
        (Triton, without(INTERPRETER, "triton"), [TRITON + "none"]),
        (Triton, V100, [TRITON_GPU + "NVIDIA V100 (capability 7.0)"]),
        (Triton, having(CPU, triton="3.6.0"), [TRITON_GPU + "cpu"]),
        (Triton, ROCM, [f"rocm: needs an NVIDIA GPU (not verified on ROCm), found {ROCM}"]),
        (Eager, CPU, []),
        (Eager, V100, []),
        (Eager, ROCM, []),
        (Eager, Machine("mps"), []),
    ],
)
def test_machine_is_refused_with_need_and_found(
    backend: Any, machine: Machine, expected: list[str]
) -> None:
    assert told(backend().refuse_machine(machine)) == expected


@pytest.mark.parametrize(
    ("problem", "machine", "expected"),
    [
        (rows(n=4095), H100, "align-n: needs N a multiple of 16, found N=4095"),
        (rows(k=7160), H100, "align-k: needs K a multiple of 16, found K=7160"),
        (rows(weight_dtype=FNUZ), H100, f"weight-dtype: {FORMATS}, found {FNUZ}"),
        (rows(out_dtype="float64"), H100, f"out-dtype: {OUTPUTS}, found float64"),
        (rows(weight_row_major=False), H100, f"layout: {LAYOUT}, found other strides"),
        (rows(aligned=False), H100, f"alignment: {ALIGNED}, found an odd address"),
        (
            rows(weight_dtype=E5M2, activation_dtype=E5M2),
            H100,
            "dtype-pair: needs at most one e5m2 operand, found two",
        ),
        (blocks(weight_dtype=E5M2), H100, f"weight-dtype: {BLOCK_FORMAT}, found {E5M2}"),
        (blocks(recipe=block(64, 128)), H100, f"block-size: {SIZES}, found block 64x128"),
        (blocks(recipe=block(1, 32)), H100, f"block-size: {SIZES}, found block 1x32"),
        (BLOCK, B200, f"capability: needs capability 9.0 for block scales, found {B200}"),
        (BLOCK, having(H100, cuda="12.8"), CUDA + "12.8"),
        (BLOCK, without(H100, "cuda"), CUDA + "none"),
    ],
)
def test_cublaslt_refuses_the_call(problem: LinearProblem, machine: Machine, expected: str) -> None:
    assert told(CuBlasLt().refuse_problem(problem, machine)) == [expected]


@pytest.mark.parametrize("backend", [Triton(), Eager()])
@pytest.mark.parametrize(
    "changes",
    [
        {"n": 4095, "k": 7161, "m": 3},
        {"weight_row_major": False, "aligned": False},
        {"weight_dtype": FNUZ, "activation_dtype": FNUZ},
        {"weight_dtype": E5M2},
        {"out_dtype": "float32", "static_activation": True},
        {"recipe": block(48, 200)},
        {"recipe": ROW, "accuracy": Accuracy.FAST},
    ],
)
def test_our_own_backends_take_every_call(backend: Any, changes: dict[str, Any]) -> None:
    assert backend.refuse_problem(blocks(**changes), H100) == ()


def test_forced_backend_raises_with_every_refusal_in_one_sentence() -> None:
    problem = rows(n=4095, k=7160, aligned=False)

    with pytest.raises(BackendUnavailableError) as caught:
        route(problem, H100, Policy(("cublaslt",), source="argument backend="))

    assert str(caught.value) == (
        "no backend allowed by argument backend= takes M=17 N=4095 K=7160, row, float8_e4m3fn "
        "weight, bfloat16 output, bias on NVIDIA H100 (capability 9.0): "
        "cublaslt needs N a multiple of 16, found N=4095; "
        "cublaslt needs K a multiple of 16, found K=7160; "
        "cublaslt needs weight memory aligned to 16 bytes, found an odd address"
    )


def test_machine_that_cannot_run_a_backend_is_told_without_demands_on_the_call() -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        route(rows(n=4095), CPU, Policy(("cublaslt", "triton")))

    message = str(caught.value)
    assert message.count("cublaslt needs") == message.count("triton needs") == 1
    assert "multiple of 16" not in message


@pytest.mark.parametrize(
    ("allowed", "chosen", "rest"),
    [
        (Policy(("triton",)), "triton", ()),
        (Policy(("eager",)), "eager", ()),
        (Policy(("triton", "cublaslt")), "triton", ("cublaslt",)),
        (Policy(excluded=("cublaslt",)), "gluon", ("triton", "eager")),
        (Policy(excluded=("gluon",)), "triton", ("cublaslt", "eager")),
        (Policy(excluded=("gluon", "triton")), "cublaslt", ("eager",)),
        (Policy(excluded=("cublaslt", "triton", "gluon")), "eager", ()),
        (Policy(("cublaslt", "eager"), ("cublaslt",)), "eager", ()),
    ],
)
def test_policy_orders_and_excludes(allowed: Policy, chosen: str, rest: tuple[str, ...]) -> None:
    decision = route(ROWS, H100, allowed)

    assert decision.backend == chosen
    assert decision.others == rest
    assert set(order_of(decision)).isdisjoint(allowed.excluded)


def test_excluding_everything_is_told() -> None:
    with pytest.raises(BackendUnavailableError, match=r"H100 .*: every backend is excluded$"):
        route(ROWS, H100, Policy(excluded=registry.NAMES))


def test_decision_explains_itself() -> None:
    decision = route(blocks(static_activation=True, has_bias=False), B200)

    lines = str(decision).splitlines()
    assert lines[:2] == [
        "triton runs M=17 N=4096 K=7168, block 128x128, float8_e4m3fn weight, bfloat16 output, "
        "static activations on NVIDIA B200 (capability 10.0) (default)",
        "  order: default",
    ]
    refused = (
        "  cublaslt needs capability 9.0 for block scales, found NVIDIA B200 (capability 10.0)"
    )
    assert refused in lines
    assert lines[-1] == "  would run it too: eager"


def test_decision_is_plain_data_that_json_keeps() -> None:
    decision = route(BLOCK, B200)

    kept = json.loads(decision.as_json())

    assert kept == decision.as_dict()
    assert kept["backend"] == "triton"
    assert kept["problem"]["recipe"] == {"granularity": "block", "block_size": [128, 128]}
    sentences = [r["sentence"] for one in kept["assessments"] for r in one["refusals"]]
    assert any(sentence.startswith("cublaslt needs capability 9.0") for sentence in sentences)


def test_a_backend_with_wrong_numbers_is_refused_and_the_next_one_runs() -> None:
    asked: list[str] = []

    def judge(name: str) -> Standing:
        asked.append(name)
        right = name != "gluon"
        return Standing("right" if right else "wrong", "the canary says so", usable=right)

    names, _ = routes.order_for(BLOCK, H100, registry.NAMES)
    decision = select(BLOCK, H100, ANYTHING, names, registry.load, judge)

    assert decision.backend == "triton"
    assert asked == ["gluon", "triton"], "nobody else was about to be chosen"
    assert decision.standing == Standing("right", "the canary says so", usable=True)
    (refusal,) = dict(decision.refusals)["gluon"]
    assert str(refusal) == (
        "needs right numbers on this machine, found wrong ones: the canary says so"
    )
    with pytest.raises(BackendUnavailableError, match="wrong ones: the canary says so"):
        select(BLOCK, H100, Policy(("gluon",)), names, registry.load, judge)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("BACKEND", "deepgem", "'deepgem' cannot be read, .* cublaslt, .*triton, .*eager, found"),
        ("BACKEND", "EAGER", "found 'EAGER'"),
        ("BACKEND", "eager,", "found ''"),
        ("BACKEND", "-", "found '-'"),
        ("BACKEND", "--eager", "found '--eager'"),
        ("ACCURACY", "best", "must be one of exact, fast, found 'best'"),
        ("ACCURACY", "0", "found '0'"),
    ],
)
def test_environment_that_cannot_be_read(
    variable: str, value: str, words: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv(f"FP8DISPATCH_{variable}", value)
    for call in (lambda: fp8_linear(X, W, SCALE), lambda: fp8_linear(X, W, SCALE, backend="eager")):
        with pytest.raises(ConfigurationError, match=f"FP8DISPATCH_{variable}.*{words}") as caught:
            call()
        assert "\n" not in str(caught.value)


X, W, SCALE = torch.ones(3, 8), torch.ones(4, 8).to(torch.float8_e4m3fn), torch.ones(1)


def test_argument_is_heard_before_the_environment(environment: pytest.MonkeyPatch) -> None:
    assert explain(X, W, SCALE).decided_by == "default"

    environment.setenv("FP8DISPATCH_BACKEND", "cublaslt")
    assert explain(X, W, SCALE).decided_by == "default", "the environment is read once"

    fp8dispatch.reload_environment()
    with pytest.raises(BackendUnavailableError, match=r"by FP8DISPATCH_BACKEND .*cublaslt needs"):
        fp8_linear(X, W, SCALE)
    assert fp8_linear(X, W, SCALE, backend="eager").shape == (3, 4)
    assert explain(X, W, SCALE, backend="eager").decided_by == "argument backend="


@pytest.mark.parametrize(
    ("value", "order"),
    [
        ("", ("eager", *(name for name in registry.NAMES if name != "eager"))),
        ("-cublaslt,-triton", tuple(n for n in registry.NAMES if n not in ("cublaslt", "triton"))),
        (" cublaslt , eager ", ("cublaslt", "eager")),
        ("eager,triton,-triton", ("eager",)),
    ],
)
def test_environment_orders_and_excludes(
    value: str, order: tuple[str, ...], environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("FP8DISPATCH_BACKEND", value)

    decision = explain(X, W, SCALE)

    assert sorted(order_of(decision)) == sorted(order)
    assert decision.backend == "eager"


def test_accuracy_of_the_environment_reaches_the_problem(environment: pytest.MonkeyPatch) -> None:
    assert explain(X, W, SCALE).problem.accuracy is Accuracy.EXACT

    environment.setenv("FP8DISPATCH_ACCURACY", "fast")
    fp8dispatch.reload_environment()

    assert explain(X, W, SCALE).problem.accuracy is Accuracy.FAST
    assert explain(X, W, SCALE, backend="eager").problem.accuracy is Accuracy.FAST


@pytest.mark.parametrize(
    "name", ["errors", "machine", "policy", "problem", "recipe", "router", "routes"]
)
def test_core_imports_no_torch(name: str) -> None:
    code = f"import fp8dispatch.{name}, sys; print({{'torch', 'triton'}} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
