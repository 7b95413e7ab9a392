"""The library backends on the GPU, each where its library is installed and loads.

FBGEMM and MSLK are not loaded into one process: run the file once with ``-k "not mslk"`` and once
with ``-k mslk``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fp8dispatch
from fp8dispatch import policy, registry
from fp8dispatch.backends.deepgemm import BACKEND as DEEPGEMM
from fp8dispatch.backends.fbgemm import BACKEND as FBGEMM
from fp8dispatch.backends.fbgemm_tile import BACKEND as FBGEMM_TILE
from fp8dispatch.backends.library import LibraryBackend
from fp8dispatch.backends.mslk import BACKEND as MSLK
from fp8dispatch.backends.mslk_tile import BACKEND as MSLK_TILE
from fp8dispatch.backends.torchao import BACKEND as TORCHAO
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.probes.device import describe
from fp8dispatch.quantization.activation import quantize_activation
from fp8dispatch.recipe import BLOCK_128, Granularity
from tests import matrix, oracle
from tests.gpu import synchronisation

pytestmark = [
    pytest.mark.gpu,
    # What these libraries and their dependencies warn of at import is theirs.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),  # an error of this kind ends an import
]

BACKENDS: dict[str, LibraryBackend] = {
    one.name: one
    # Of the two libraries the first one asked is loaded.
    for one in (FBGEMM, FBGEMM_TILE, MSLK, MSLK_TILE, TORCHAO, DEEPGEMM)
}
ROWS = ("tensor", "row")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> LibraryBackend:
    """A backend that runs here; the others skip with their refusal."""
    one = BACKENDS[request.param]
    if one.name not in registry.NAMES:
        pytest.skip(f"{one.name} is not registered")
    reasons = one.refuse_machine(describe(torch.device("cuda", 0))) or one.loadable(BLOCK_128)
    if reasons:
        pytest.skip("; ".join(f"{one.name} {reason}" for reason in reasons))
    return one


def takes(backend: LibraryBackend, case: matrix.Case) -> bool:
    """What the documentation of the backend promises to run."""
    block = case.recipe not in ROWS
    if case.out_dtype != torch.bfloat16 or (block and case.bias != "none"):
        return False
    if case.recipe not in ("block128x128", *ROWS) or matrix.RECIPES[
        case.recipe
    ].granularity not in (backend.recipes):
        return False
    tiles = backend.rows_per_scale > 1
    if tiles and case.static:
        return False
    align_k = 16 if not block or tiles or backend.name == "deepgemm" else 128
    align_n = 1 if backend.name == "torchao" else 8
    return case.k % align_k == 0 and case.n % align_n == 0


@pytest.mark.parametrize("recipe", matrix.RECIPES)
def test_numbers_within_bounds_or_a_refusal(backend: LibraryBackend, recipe: str) -> None:
    bench = matrix.Bench("cuda")
    for case in matrix.cases(backend.name, recipe):
        if not matrix.affordable(case):
            continue
        outcome = bench.run(case)
        assert (outcome.refusal is None) == takes(backend, case), f"{case.label}: {outcome.refusal}"
        if outcome.refusal is not None:
            assert f"{backend.name} needs" in outcome.refusal
            assert "\n" not in outcome.refusal


def test_every_number_of_rows_is_padded_right(backend: LibraryBackend) -> None:
    """A wrong row count would end the CUDA context, not fail an assertion."""
    bench = matrix.Bench("cuda")
    n, k = (264, 512) if backend.name == "torchao" else (264, 640)
    numbers = (1, 3, 130) if backend.name == "torchao" else (*range(1, 19), 63, 129, 257)
    for m in numbers:
        case = matrix.Case(backend.name, "block128x128", m, n, k, torch.bfloat16, "none")
        assert bench.run(case).refusal is None, case.label
    torch.cuda.synchronize()


@pytest.mark.parametrize("recipe", ROWS)
def test_fast_accumulation_stays_within_its_own_bound(
    backend: LibraryBackend, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Granularity.ROW not in backend.recipes:
        pytest.skip(f"{backend.name} takes blocks only")
    monkeypatch.setenv(policy.ACCURACY_VARIABLE, "fast")
    policy.reload_environment()
    try:
        bench = matrix.Bench("cuda")
        for m, k in ((3, 512), (130, 4096), (130, 16384)):
            case = matrix.Case(backend.name, recipe, m, 256, k, torch.bfloat16, "float32")
            outcome = bench.run(case, accumulation=oracle.FAST_ACCUMULATION)
            assert outcome.refusal is None, case.label
    finally:
        monkeypatch.undo()
        policy.reload_environment()


def block_call(
    backend: LibraryBackend, m: int = 130
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Activations, the product that they should give, and the linear."""
    weight, scale = oracle.make_weight(264, 512, BLOCK_128, device="cuda")
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    x[: m // 3, 128:256] = 0

    def linear(value: torch.Tensor) -> torch.Tensor:
        return fp8dispatch.fp8_linear(value, weight, scale, backend=backend.name)

    expected = oracle.truth(
        oracle.dequantized_activations(x, BLOCK_128, rows_per_scale=backend.rows_per_scale),
        oracle.dequantized_weight(weight, scale, BLOCK_128),
    )
    out = linear(x)
    oracle.assert_matches(out, expected, label=backend.name)
    return x, out, linear


def test_side_streams_and_graphs_give_the_same_numbers(backend: LibraryBackend) -> None:
    x, expected, linear = block_call(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a launch on another stream would now read too early
        late = torch.zeros_like(x).copy_(x)
        on_side = linear(late)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear(x)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()

    assert torch.equal(on_side, expected)
    assert torch.equal(captured, expected)


def test_a_second_call_does_not_synchronise(backend: LibraryBackend) -> None:
    x, expected, linear = block_call(backend)
    with synchronisation.forbidden():
        again = linear(x)
    assert torch.equal(again, expected)


def test_a_non_finite_row_stays_alone(backend: LibraryBackend) -> None:
    x, _, linear = block_call(backend)
    x[5] = 0  # else its values would count for the scales of a tile
    clean = linear(x)
    x[5, 300] = float("nan")
    dirty = linear(x)

    assert not torch.isfinite(dirty[5]).any()
    assert torch.equal(torch.cat([dirty[:5], dirty[6:]]), torch.cat([clean[:5], clean[6:]]))


def test_quantised_operands_in_any_memory(backend: LibraryBackend) -> None:
    weight, scale = oracle.make_weight(264, 512, BLOCK_128, device="cuda")
    x = torch.randn(130, 512, device="cuda", dtype=torch.bfloat16)
    expected = fp8dispatch.fp8_linear(x, weight, scale, backend=backend.name)
    made = quantize_activation(x, 128, torch.float8_e4m3fn)
    if backend.rows_per_scale > 1:
        with pytest.raises(BackendUnavailableError, match=r"found scales \[130, 4\]"):
            fp8dispatch.fp8_linear_quantized(made, weight, scale, backend=backend.name)
        return
    wide = torch.zeros(130, 523, dtype=torch.uint8, device="cuda")
    wide[:, 3:515] = made.data.view(torch.uint8)
    odd = wide.view(torch.float8_e4m3fn)[:, 3:515]
    for data in (made.data, odd):
        for scales in (made.scale, made.scale.contiguous()):
            operand = fp8dispatch.QuantizedActivation(data, scales)
            out = fp8dispatch.fp8_linear_quantized(operand, weight, scale, backend=backend.name)
            assert torch.equal(out, expected)


def test_deepgemm_takes_a_weight_whose_rows_have_gaps() -> None:
    reasons = DEEPGEMM.refuse_machine(describe(torch.device("cuda", 0)))
    reasons = reasons or DEEPGEMM.loadable(BLOCK_128)
    if reasons or DEEPGEMM.name not in registry.NAMES:
        pytest.skip(f"deepgemm does not run here: {reasons}")
    weight, scale = oracle.make_weight(264, 512, BLOCK_128, device="cuda")
    wide = torch.zeros(264, 528, dtype=torch.uint8, device="cuda")
    wide[:, :512] = weight.view(torch.uint8)
    gaps = wide.view(torch.float8_e4m3fn)[:, :512]
    x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    out = fp8dispatch.fp8_linear(x, gaps, scale, backend="deepgemm")
    assert torch.equal(out, fp8dispatch.fp8_linear(x, weight, scale, backend="deepgemm"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(backend: LibraryBackend) -> None:
    weight, scale = oracle.make_weight(264, 512, BLOCK_128, device="cuda:1")
    x = torch.randn(130, 512, device="cuda:1", dtype=torch.bfloat16)
    first = fp8dispatch.fp8_linear(
        x.to("cuda:0"), weight.to("cuda:0"), scale.to("cuda:0"), backend=backend.name
    )
    assert torch.cuda.current_device() == 0
    out = fp8dispatch.fp8_linear(x, weight, scale, backend=backend.name)

    assert out.device == x.device
    assert torch.equal(out.cpu(), first.cpu())


def test_a_weight_is_never_copied(backend: LibraryBackend) -> None:
    """What a call allocates stays far below its weight."""
    weight, scale = oracle.make_weight(4096, 2048, BLOCK_128, device="cuda")
    x = torch.randn(3, 2048, device="cuda", dtype=torch.bfloat16)
    fp8dispatch.fp8_linear(x, weight, scale, backend=backend.name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fp8dispatch.fp8_linear(x, weight, scale, backend=backend.name)

    assert torch.cuda.max_memory_allocated() - before < weight.numel() // 4
