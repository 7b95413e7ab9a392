"""Every backend on the GPU: right numbers within the stated bounds, or a refusal sentence."""

from __future__ import annotations

import pytest
import torch

import fp8dispatch
from fp8dispatch import policy
from fp8dispatch.recipe import BLOCK_128
from tests import matrix, oracle
from tests.gpu import synchronisation

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recipe", matrix.RECIPES)
@pytest.mark.parametrize("backend", matrix.SHIPPED)
def test_numbers_within_bounds_or_a_refusal(backend: str, recipe: str) -> None:
    bench = matrix.Bench("cuda")
    ran = 0
    for case in matrix.cases(backend, recipe):
        outcome = bench.run(case)
        if outcome.refusal is None:
            ran += 1
        else:
            assert "\n" not in outcome.refusal
            assert f"{backend} needs" in outcome.refusal, case.label

    if backend != "cublaslt":  # it takes no other blocks, and says so
        assert ran == sum(1 for _ in matrix.cases(backend, recipe))


@pytest.mark.parametrize("recipe", ["tensor", "row", "block128x128", "group128"])
def test_cublaslt_runs_its_recipes(recipe: str) -> None:
    """The matrix above would pass if everything were refused; this would not."""
    bench = matrix.Bench("cuda")
    for out_dtype in (torch.bfloat16, torch.float16):
        for m in (1, 3, 130):
            case = matrix.Case("cublaslt", recipe, m, 272, 1040, out_dtype, "output")
            assert bench.run(case).refusal is None, case.label


@pytest.mark.parametrize("backend", matrix.SHIPPED)
@pytest.mark.parametrize("recipe", ["tensor", "row"])
def test_fast_accumulation_stays_within_its_own_bound(
    backend: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(policy.ACCURACY_VARIABLE, "fast")
    policy.reload_environment()
    try:
        bench = matrix.Bench("cuda")
        for m, k in ((3, 512), (130, 4096), (130, 16384)):
            for out_dtype in (torch.bfloat16, torch.float16):
                case = matrix.Case(backend, recipe, m, 256, k, out_dtype, "none")
                outcome = bench.run(case, accumulation=oracle.FAST_ACCUMULATION)
                assert outcome.refusal is None, case.label
    finally:
        monkeypatch.undo()
        policy.reload_environment()


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str
)
@pytest.mark.parametrize("recipe", ["tensor", "row", "block128x128", "group32"])
def test_other_fp8_formats(backend: str, dtype: torch.dtype, recipe: str) -> None:
    chosen = matrix.RECIPES[recipe]
    for m, n, k in ((1, 64, 128), (37, 200, 333), (130, 256, 512)):
        weight, scale = oracle.make_weight(n, k, chosen, dtype=dtype, device="cuda")
        x = torch.randn(m, k, device="cuda")
        bias = torch.randn(n, device="cuda")
        out = fp8dispatch.fp8_linear(
            x, weight, scale, bias, block_size=chosen.block_size, backend=backend
        )
        wide_x = oracle.dequantized_activations(x, chosen, dtype)
        wide_weight = oracle.dequantized_weight(weight, scale, chosen)
        oracle.assert_matches(out, oracle.truth(wide_x, wide_weight, bias), label=f"{m}x{n}x{k}")


def test_cublaslt_refuses_e5m2_blocks() -> None:
    weight, scale = oracle.make_weight(272, 1040, BLOCK_128, dtype=torch.float8_e5m2, device="cuda")
    x = torch.randn(130, 1040, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(fp8dispatch.BackendUnavailableError, match="float8_e4m3fn weights"):
        fp8dispatch.fp8_linear(x, weight, scale, backend="cublaslt")


@pytest.mark.parametrize("recipe", ["tensor", "row"])
def test_e5m2_weights_on_cublaslt(recipe: str) -> None:
    chosen = matrix.RECIPES[recipe]
    weight, scale = oracle.make_weight(272, 1040, chosen, dtype=torch.float8_e5m2, device="cuda")
    x = torch.randn(130, 1040, device="cuda", dtype=torch.bfloat16)
    out = fp8dispatch.fp8_linear(x, weight, scale, backend="cublaslt")
    expected = oracle.truth(
        oracle.dequantized_activations(x, chosen, torch.float8_e5m2),
        oracle.dequantized_weight(weight, scale, chosen),
    )
    oracle.assert_matches(out, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("recipe", ["tensor", "row", "block128x128", "group32"])
@pytest.mark.parametrize("backend", matrix.SHIPPED)
def test_a_non_finite_row_stays_non_finite_and_alone(
    backend: str, recipe: str, static: bool, bad: float
) -> None:
    chosen = matrix.RECIPES[recipe]
    weight, scale = oracle.make_weight(256, 512, chosen, device="cuda")
    x = torch.randn(37, 512, device="cuda", dtype=torch.bfloat16)
    activation_scale = torch.tensor([0.01], device="cuda") if static else None

    def run(value: torch.Tensor) -> torch.Tensor:
        return fp8dispatch.fp8_linear(
            value,
            weight,
            scale,
            block_size=chosen.block_size,
            activation_scale=activation_scale,
            backend=backend,
        )

    try:
        clean = run(x)
    except fp8dispatch.BackendUnavailableError as refusal:
        assert f"{backend} needs" in str(refusal)
        return
    x[5, 300] = bad
    dirty = run(x)

    assert not torch.isfinite(dirty[5]).any()
    assert torch.equal(torch.cat([dirty[:5], dirty[6:]]), torch.cat([clean[:5], clean[6:]]))


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_a_transposed_weight_is_right_and_not_copied(backend: str) -> None:
    weight, scale = oracle.make_weight(4096, 2048, BLOCK_128, device="cuda")
    x = torch.randn(16, 2048, device="cuda", dtype=torch.bfloat16)
    straight = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
    physically = weight.view(torch.uint8).t().contiguous().view(weight.dtype)  # [K, N]
    for transposed in (weight.t(), physically):
        fp8dispatch.fp8_linear(x, transposed, scale.t(), backend=backend)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = fp8dispatch.fp8_linear(x, transposed, scale.t(), backend=backend)

        assert torch.cuda.max_memory_allocated() - before < weight.numel()
        torch.testing.assert_close(out, straight, rtol=2e-2, atol=1e-2)


def test_cublaslt_refuses_a_column_major_weight() -> None:
    weight, scale = oracle.make_weight(256, 512, BLOCK_128, device="cuda")
    physically = weight.view(torch.uint8).t().contiguous().view(weight.dtype)
    x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(fp8dispatch.BackendUnavailableError, match="a row-major weight"):
        fp8dispatch.fp8_linear(x, physically, scale.t(), backend="cublaslt")


def test_backends_agree_on_quantised_operands() -> None:
    """Operands quantised once give every backend the same numbers to work on."""
    for recipe in ("tensor", "row", "block128x128"):
        chosen = matrix.RECIPES[recipe]
        weight, scale = oracle.make_weight(272, 1040, chosen, device="cuda")
        x = torch.randn(5, 27, 1040, device="cuda", dtype=torch.bfloat16)
        group = chosen.block_size[1] if chosen.block_size is not None else None
        quantized = fp8dispatch.QuantizedActivation.from_tensor(x, group_size=group)
        expected = oracle.truth(
            oracle.dequantized_activations(x, chosen),
            oracle.dequantized_weight(weight, scale, chosen),
        )
        for backend in matrix.SHIPPED:
            out = fp8dispatch.fp8_linear_quantized(quantized, weight, scale, backend=backend)
            assert out.shape == (5, 27, 272)
            oracle.assert_matches(out, expected, label=f"{backend} {recipe}")


@pytest.mark.parametrize("m", [1, 16, 300])
def test_calls_that_come_again_compute_what_the_first_did(m: int) -> None:
    """From the third call on launches may be ready: another way to the same bits."""
    weight, scale = oracle.make_weight(256, 512, BLOCK_128, device="cuda")
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    for backend in (*matrix.SHIPPED, "gluon", "weight_only"):
        first = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
        for _ in range(5):
            again = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
            assert torch.equal(first, again), backend


def test_a_second_call_does_not_synchronise() -> None:
    weight, scale = oracle.make_weight(256, 512, BLOCK_128, device="cuda")
    x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    for backend in matrix.SHIPPED:
        first = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
        with synchronisation.forbidden():
            second = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)

        assert torch.equal(first, second), backend


def test_side_streams_and_graphs_give_the_same_numbers() -> None:
    weight, scale = oracle.make_weight(256, 512, BLOCK_128, device="cuda")
    x = torch.randn(130, 512, device="cuda", dtype=torch.bfloat16)
    for backend in matrix.SHIPPED:
        expected = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_side = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()

        assert torch.equal(on_side, expected), backend
        assert torch.equal(captured, expected), backend


@pytest.mark.parametrize("backend", matrix.SHIPPED)
def test_a_graph_captured_before_any_call_leaves_no_unfinished_layout(backend: str) -> None:
    """What is prepared during capture is computed at replay only, so it must not be kept."""
    warm_weight, warm_scale = oracle.make_weight(256, 512, BLOCK_128, device="cuda")
    weight, scale = oracle.make_weight(256, 512, BLOCK_128, device="cuda")
    x = torch.randn(130, 512, device="cuda", dtype=torch.bfloat16)
    fp8dispatch.fp8_linear(x, warm_weight, warm_scale, backend=backend)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
    before_replay = fp8dispatch.fp8_linear(x, weight, scale, backend=backend)
    graph.replay()
    torch.cuda.synchronize()

    expected = oracle.truth(
        oracle.dequantized_activations(x, BLOCK_128),
        oracle.dequantized_weight(weight, scale, BLOCK_128),
    )
    oracle.assert_matches(before_replay, expected)
    assert torch.equal(captured, before_replay)


@pytest.mark.parametrize("recipe", ["row", "block128x128"])
def test_the_gpu_quantises_to_the_bytes_of_the_cpu(recipe: str) -> None:
    chosen = matrix.RECIPES[recipe]
    x = torch.randn(333, 4096, dtype=torch.bfloat16) * torch.logspace(-6, 3, 333)[:, None]
    group = chosen.block_size[1] if chosen.block_size is not None else None
    here = fp8dispatch.QuantizedActivation.from_tensor(x, group_size=group)
    there = fp8dispatch.QuantizedActivation.from_tensor(x.cuda(), group_size=group)

    assert torch.equal(there.scale.cpu(), here.scale)
    assert torch.equal(there.data.cpu().view(torch.uint8), here.data.view(torch.uint8))
