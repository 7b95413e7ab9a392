"""The Gluon kernels on a Hopper GPU: the matrix, every kind in turn, memory, streams and graphs."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

import fp8dispatch
from fp8dispatch import workspace
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.gluon import BACKEND
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.formats import dtype_name
from fp8dispatch.kernels.hopper_config import HopperConfig, decode_config, gemm_config
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.probes.device import describe
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import quantize_activation
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import matrix, oracle
from tests.gpu import synchronisation

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.gpu

LARGE = Recipe(Granularity.BLOCK, (384, 256))
TAKEN = {"tensor": TENSOR, "row": ROW, "block128x128": BLOCK_128, "block384x256": LARGE}
MULTIPROCESSORS = 132


@pytest.fixture(autouse=True)
def hopper(request: pytest.FixtureRequest) -> None:
    """Skip where the backend does not run, with its refusal."""
    reasons = BACKEND.refuse_machine(describe(torch.device("cuda", 0))) or BACKEND.loadable(
        BLOCK_128
    )
    if reasons:
        pytest.skip("; ".join(f"gluon {reason}" for reason in reasons))


@dataclass
class Operands:
    """One call: activations quantised in a layout of the caller's choice, weight, bias, truth."""

    m: int
    n: int
    k: int
    recipe: Recipe
    out_dtype: torch.dtype = torch.bfloat16
    with_bias: bool = False
    align: int = 4
    static: bool = False

    def __post_init__(self) -> None:
        self.data, self.scale = oracle.make_weight(self.n, self.k, self.recipe, device="cuda")
        self.x = torch.randn(self.m, self.k, device="cuda", dtype=torch.bfloat16)
        if self.m > 3:
            self.x[2] = 0
            self.x[3, : self.k // 3] *= 50
        self.bias = torch.randn(self.n, device="cuda") if self.with_bias else None
        self.given = torch.tensor([0.013], device="cuda") if self.static else None
        self.quantized = quantize_activation(
            self.x,
            self.recipe.group_size(self.k),
            torch.float8_e4m3fn,
            self.given,
            pad_rows_to=self.align,
        )
        self.problem = LinearProblem(
            self.m,
            self.n,
            self.k,
            self.recipe,
            "float8_e4m3fn",
            "float8_e4m3fn",
            dtype_name(self.out_dtype),
            self.with_bias,
            self.static,
        )
        self.weight = Weight(
            self.data,
            weight_scale_fp32(self.scale, self.recipe, self.n, self.k),
            self.recipe,
            self.scale,
        )

    def run(self, config: HopperConfig | None = None) -> torch.Tensor:
        return BACKEND.multiply(self.quantized, self.weight, self.bias, self.problem, config)

    def judge(self, out: torch.Tensor, label: str) -> None:
        expected = oracle.linear_truth(
            self.x, self.data, self.scale, self.recipe, self.bias, self.given
        )
        # See `oracle.assert_matches`; a row of one column is one value, which may cancel.
        floor = None if self.n >= 128 else 40.0 if self.n > 1 else float("-inf")
        if self.k <= 256:
            floor = min(60.0 if floor is None else floor, oracle.MIN_SQNR[self.out_dtype])
        accumulation = oracle.exact_accumulation(self.k)
        oracle.assert_matches(out, expected, accumulation=accumulation, label=label, min_sqnr=floor)


def wide(m: int, n: int, k: int) -> HopperConfig:
    return gemm_config("wide", m, k)


def square(m: int, n: int, k: int) -> HopperConfig:
    return gemm_config("square", m, k, masked=True)


def square_long(m: int, n: int, k: int) -> HopperConfig:
    return gemm_config("square", m, k)


def halves(m: int, n: int, k: int) -> HopperConfig:
    return gemm_config("split", m, k, split=2)


def thirds(m: int, n: int, k: int) -> HopperConfig:
    return gemm_config("split", m, k, split=3)


def quarters(m: int, n: int, k: int) -> HopperConfig:
    return gemm_config("split", m, k, split=4)


def narrow(m: int, n: int, k: int) -> HopperConfig:
    return gemm_config("square", m, k, narrow=True)


def narrow_thirds(m: int, n: int, k: int) -> HopperConfig:
    return gemm_config("split", m, k, split=3, narrow=True)


def decode(m: int, n: int, k: int) -> HopperConfig:
    return decode_config(m, n, k, MULTIPROCESSORS)


def decode_shallow(m: int, n: int, k: int) -> HopperConfig:
    """As for a weight of several waves of tiles."""
    found = decode_config(m, 100_000, k, MULTIPROCESSORS)
    return found._replace(split=1)


def decode_tall(m: int, n: int, k: int) -> HopperConfig:
    """Two 64-row tiles of the weight for each box of the activations, in four warps."""
    found = decode_config(m, n, k, MULTIPROCESSORS)
    chunk = min(found.chunk, 2)
    return found._replace(block_n=128, chunk=chunk, stages=min(found.stages, 8) // chunk * chunk)


def decode_split(m: int, n: int, k: int) -> HopperConfig:
    found = decode_config(m, n, k, MULTIPROCESSORS)
    return found._replace(split=3, chunk=1, stages=min(found.stages, max(1, k // 128 // 3)))


GEMMS = (wide, square, square_long, narrow, narrow_thirds, halves, thirds, quarters)
DECODES = (decode, decode_shallow, decode_tall, decode_split)


@pytest.mark.parametrize("recipe", matrix.RECIPES)
def test_numbers_within_bounds_or_a_refusal(recipe: str) -> None:
    bench = matrix.Bench("cuda")
    for case in matrix.cases("gluon", recipe):
        outcome = bench.run(case)
        taken = recipe in TAKEN and case.k % 16 == 0
        assert (outcome.refusal is None) == taken, f"{case.label}: {outcome.refusal}"
        if outcome.refusal is not None:
            assert "gluon needs" in outcome.refusal
            assert "\n" not in outcome.refusal


@pytest.mark.parametrize("recipe", TAKEN)
@pytest.mark.parametrize("kind", GEMMS, ids=lambda kind: kind.__name__)
def test_every_gemm_is_right_on_ragged_sizes(
    kind: Callable[..., HopperConfig], recipe: str
) -> None:
    """Short and long K, tails of M, N and K, one row, many tiles a program, every output dtype."""
    sizes = [
        (1, 264, 128, torch.bfloat16, False),
        (65, 256, 144, torch.float16, True),
        (130, 384, 640, torch.float32, True),
        (257, 136, 1040, torch.bfloat16, True),
        (300, 640, 1664, torch.bfloat16, False),
        (2048, 4360, 1152, torch.bfloat16, True),
        (2100, 3000, 2304, torch.float32, False),
    ]
    for m, n, k, dtype, bias in sizes:
        operands = Operands(m, n, k, TAKEN[recipe], dtype, bias)
        label = f"{kind.__name__} {recipe} {m}x{n}x{k} {dtype}"
        operands.judge(operands.run(kind(m, n, k)), label)


@pytest.mark.parametrize("recipe", TAKEN)
@pytest.mark.parametrize(
    "kind", (square, narrow, narrow_thirds, halves, quarters), ids=lambda kind: kind.__name__
)
def test_outputs_that_bulk_copies_cannot_store(
    kind: Callable[..., HopperConfig], recipe: str
) -> None:
    """N of any remainder: rows of the output start anywhere."""
    for m, n, k, dtype in [
        (130, 201, 640, torch.bfloat16),
        (67, 1, 256, torch.float16),
        (129, 130, 1040, torch.float32),
        (515, 999, 384, torch.bfloat16),
        (4096, 1021, 512, torch.bfloat16),
    ]:
        operands = Operands(m, n, k, TAKEN[recipe], dtype, True)
        operands.judge(operands.run(kind(m, n, k)), f"{kind.__name__} {recipe} {m}x{n}x{k}")


@pytest.mark.parametrize("recipe", TAKEN)
@pytest.mark.parametrize("kind", DECODES, ids=lambda kind: kind.__name__)
def test_every_decode_kernel_is_right(kind: Callable[..., HopperConfig], recipe: str) -> None:
    for m, n, k, dtype, bias in [
        (1, 1, 16, torch.float32, True),
        (1, 256, 512, torch.bfloat16, False),
        (2, 201, 1040, torch.float16, True),
        (16, 4096, 7168, torch.bfloat16, True),
        (17, 264, 640, torch.bfloat16, False),
        (31, 1000, 2048, torch.float32, True),
        (33, 320, 4096, torch.bfloat16, True),
        (64, 1088, 3328, torch.float16, False),
    ]:
        operands = Operands(m, n, k, TAKEN[recipe], dtype, bias, align=1)
        label = f"{kind.__name__} {recipe} {m}x{n}x{k} {dtype}"
        operands.judge(operands.run(kind(m, n, k)), label)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 9000, 1024), (48, 16_384, 1024), (16, 90_112, 512), (64, 90_112, 384), (7, 192, 53_248)],
)
def test_decode_shapes_of_every_class(m: int, n: int, k: int) -> None:
    """One wave, several, and a K so long that its scales fill a part of shared memory."""
    operands = Operands(m, n, k, BLOCK_128)
    operands.judge(operands.run(), f"{m}x{n}x{k}")


@pytest.mark.parametrize("kind", (*GEMMS, *DECODES), ids=lambda kind: kind.__name__)
def test_repeats_bit_for_bit_and_leaves_its_counters_clear(
    kind: Callable[..., HopperConfig],
) -> None:
    m = 64 if kind in DECODES else 300
    operands = Operands(m, 520, 4096, BLOCK_128, with_bias=True)
    config = kind(m, 520, 4096)
    first = operands.run(config)
    for _ in range(30):
        for partials, counters in workspace._kept.values():
            assert not counters.any()
            partials.fill_(float("nan"))  # nothing is read that this launch has not written
        assert torch.equal(operands.run(config), first)


def test_direct_and_plain_launches_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8dispatch.kernels import direct_launch, gluon_launch, hopper_launch

    calls = [(m, Operands(m, 264, 1024, BLOCK_128, with_bias=bias)) for m in (5, 130, 600)
             for bias in (False, True)]  # fmt: skip
    found = [operands.run() for _, operands in calls]
    monkeypatch.setattr(direct_launch, "_kernels", {})
    monkeypatch.setattr(hopper_launch, "_plans", {})
    monkeypatch.setattr(gluon_launch, "direct_launch", lambda device: False)
    for (m, operands), direct in zip(calls, found, strict=True):
        assert torch.equal(operands.run(), direct), m


def test_the_installed_triton_launches_directly() -> None:
    import triton

    from fp8dispatch.kernels.gluon_launch import DIRECT_TRITON, direct_launch

    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    assert direct_launch(0) == (version in DIRECT_TRITON)


@pytest.mark.parametrize("m", [1, 64, 130, 1000])
def test_a_second_call_does_not_synchronise(m: int) -> None:
    weight, scale = oracle.make_weight(264, 4096, BLOCK_128, device="cuda")
    x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
    first = fp8dispatch.fp8_linear(x, weight, scale, backend="gluon")
    with synchronisation.forbidden():
        second = fp8dispatch.fp8_linear(x, weight, scale, backend="gluon")
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "kind", (wide, halves, narrow_thirds, decode, decode_split), ids=lambda k: k.__name__
)
def test_graphs_replay_beside_eager_calls(kind: Callable[..., HopperConfig]) -> None:
    """A captured launch has its own workspace: replays on another stream disturb nobody."""
    m = 30 if kind in DECODES else 200
    operands = Operands(m, 520, 4096, BLOCK_128, with_bias=True)
    config = kind(m, 520, 4096)
    expected = operands.run(config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [operands.run(config) for _ in range(3)]
    for out in captured:
        out.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    eager = []
    for _ in range(10):
        with torch.cuda.stream(side):
            graph.replay()
        eager.append(operands.run(config))
    torch.cuda.synchronize()
    for out in (*captured, *eager):
        assert torch.equal(out, expected)


def test_a_first_call_inside_a_graph_is_refused_and_harms_nothing() -> None:
    operands = Operands(200, 776, 1536, BLOCK_128)  # sizes that no other test uses
    graph = torch.cuda.CUDAGraph()
    spare = torch.zeros(8, device="cuda")
    with torch.cuda.graph(graph):
        spare += 1
        with pytest.raises(BackendUnavailableError, match="before CUDA graph capture"):
            operands.run()
    graph.replay()
    operands.judge(operands.run(), "after the refusal")


@pytest.mark.parametrize("kind", (halves, decode_split, wide), ids=lambda kind: kind.__name__)
def test_streams_and_threads_do_not_share_a_workspace(kind: Callable[..., HopperConfig]) -> None:
    m = 48 if kind in DECODES else 200
    calls = [Operands(m, 520, 4096, BLOCK_128) for _ in range(4)]
    config = kind(m, 520, 4096)
    expected = [operands.run(config) for operands in calls]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            outs = [calls[index].run(config) for _ in range(50)]
            stream.synchronize()
            if not all(torch.equal(out, expected[index]) for out in outs):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("recipe", TAKEN)
@pytest.mark.parametrize("m", [1, 16, 64, 130, 600])
def test_linears_repeat_with_other_inputs(m: int, recipe: str, static: bool) -> None:
    """From the third call on the launches are ready made: input, bias and output still change."""
    given = torch.tensor([0.013], device="cuda") if static else None
    weights = [oracle.make_weight(n, 1024, TAKEN[recipe], device="cuda") for n in (264, 264, 520)]
    inputs = [torch.randn(m, 1024, device="cuda", dtype=dtype)
              for dtype in (torch.bfloat16, torch.bfloat16, torch.float16)]  # fmt: skip
    strided = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)[:, ::2]
    biases = {n: [torch.randn(n, device="cuda") for _ in range(2)] for n in (264, 520)}
    for turn in range(4):
        for weight, scale in weights:
            for x in (*inputs, strided, inputs[0] * (turn + 1)):
                for bias in (None, *biases[weight.shape[0]]):
                    out = fp8dispatch.fp8_linear(
                        x,
                        weight,
                        scale,
                        bias,
                        block_size=TAKEN[recipe].block_size,
                        activation_scale=given,
                        backend="gluon",
                    )
                    expected = oracle.linear_truth(x, weight, scale, TAKEN[recipe], bias, given)
                    oracle.assert_matches(out, expected, label=f"turn {turn}")


def test_threads_on_one_stream_do_not_share_their_activations() -> None:
    weight, scale = oracle.make_weight(264, 2048, BLOCK_128, device="cuda")
    inputs = [torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    expected = [fp8dispatch.fp8_linear(x, weight, scale, backend="gluon") for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        outs = [
            fp8dispatch.fp8_linear(inputs[index], weight, scale, backend="gluon")
            for _ in range(300)
        ]
        torch.cuda.synchronize()
        if not all(torch.equal(out, expected[index]) for out in outs):
            wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_launch_waits_for_its_stream() -> None:
    operands = Operands(130, 264, 512, BLOCK_128)
    expected = operands.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a launch on another stream would now read too early
        late = torch.zeros_like(operands.x).copy_(operands.x)
        out = fp8dispatch.fp8_linear(late, operands.data, operands.scale, backend="gluon")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("recipe", TAKEN)
@pytest.mark.parametrize("m", [1, 16, 64, 130, 300, 2100])
def test_e5m2_weights(m: int, recipe: str) -> None:
    """The tensor core multiplies e4m3 by e5m2: every kind of kernel does."""
    for n, k in ((264, 640), (201, 1040), (4360, 1152)):
        weight, scale = oracle.make_weight(
            n, k, TAKEN[recipe], dtype=torch.float8_e5m2, device="cuda"
        )
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        out = fp8dispatch.fp8_linear(
            x, weight, scale, block_size=TAKEN[recipe].block_size, backend="gluon"
        )
        oracle.assert_matches(out, oracle.linear_truth(x, weight, scale, TAKEN[recipe]))


@pytest.mark.parametrize("m", [5, 130])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_stays_alone(m: int, bad: float) -> None:
    weight, scale = oracle.make_weight(264, 512, BLOCK_128, device="cuda")
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    clean = fp8dispatch.fp8_linear(x, weight, scale, backend="gluon")
    x[3, 300] = bad
    dirty = fp8dispatch.fp8_linear(x, weight, scale, backend="gluon")
    assert not torch.isfinite(dirty[3]).any()
    assert torch.equal(torch.cat([dirty[:3], dirty[4:]]), torch.cat([clean[:3], clean[4:]]))


@pytest.mark.parametrize("m", [5, 130])
def test_weights_and_activations_in_any_memory(m: int) -> None:
    """Rows with gaps that hold NaN codes, odd addresses, scales in either order, row slices."""
    operands = Operands(m, 264, 528, BLOCK_128, align=1)
    expected = operands.run()
    roomy = torch.full((264, 544), 0x7F, dtype=torch.uint8, device="cuda")
    roomy[:, :528] = operands.data.view(torch.uint8)
    gaps = roomy.view(torch.float8_e4m3fn)[:, :528]
    made = operands.quantized
    odd = torch.full((m, 541), 0x7F, dtype=torch.uint8, device="cuda")
    odd[:, 3:531] = made.data.view(torch.uint8)
    moved = odd.view(torch.float8_e4m3fn)[:, 3:531]
    bias = torch.randn(265, device="cuda")[1:]
    with_bias = fp8dispatch.fp8_linear_quantized(
        made, operands.data, operands.scale, bias.clone(), backend="gluon"
    )
    for data in (made.data, moved):
        for scale in (made.scale, made.scale.contiguous(), made.scale.t().contiguous().t()):
            operand = fp8dispatch.QuantizedActivation(data, scale)
            out = fp8dispatch.fp8_linear_quantized(operand, gaps, operands.scale, backend="gluon")
            assert torch.equal(out, expected)
            out = fp8dispatch.fp8_linear_quantized(
                operand, gaps, operands.scale, bias, backend="gluon"
            )
            assert torch.equal(out, with_bias)


def test_a_new_weight_at_an_old_address_is_read_anew() -> None:
    """A kept tensor map names an address, never its content."""
    operands = Operands(130, 264, 512, BLOCK_128)
    operands.run()
    other = Operands(130, 264, 512, BLOCK_128)
    operands.data.view(torch.uint8).copy_(other.data.view(torch.uint8))
    operands.weight.scale.copy_(other.weight.scale)
    expected = oracle.linear_truth(operands.x, other.data, other.scale, BLOCK_128)
    oracle.assert_matches(operands.run(), expected)


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("n", [32_768, 32_769])
def test_outputs_beyond_32_bit_offsets(n: int) -> None:
    """4.6 GB of output: its last rows lie past 2**31 elements."""
    m, k = 70_000, 128
    operands = Operands(m, n, k, BLOCK_128)
    out = operands.run()
    rows = torch.tensor([0, 1, 33_000, 65_535, 65_536, m - 2, m - 1], device="cuda")
    expected = oracle.linear_truth(operands.x[rows], operands.data, operands.scale, BLOCK_128)
    oracle.assert_matches(out[rows], expected)
    assert bool(torch.isfinite(out.view(-1)[:: n - 1]).all())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    here = Operands(200, 520, 4096, BLOCK_128)
    for m, config in ((200, halves(200, 520, 4096)), (200, None), (20, None)):
        x = here.x[:m]
        expected = fp8dispatch.fp8_linear(x, here.data, here.scale, backend="gluon")
        there = [tensor.to("cuda:1") for tensor in (x, here.data, here.scale)]
        out = fp8dispatch.fp8_linear(*there, backend="gluon")
        assert torch.cuda.current_device() == 0
        assert out.device == there[0].device
        assert torch.equal(out.cpu(), expected.cpu()), config


def test_a_weight_is_never_copied() -> None:
    weight, scale = oracle.make_weight(4096, 2048, BLOCK_128, device="cuda")
    x = torch.randn(3, 2048, device="cuda", dtype=torch.bfloat16)
    fp8dispatch.fp8_linear(x, weight, scale, backend="gluon")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fp8dispatch.fp8_linear(x, weight, scale, backend="gluon")
    assert torch.cuda.max_memory_allocated() - before < weight.numel() // 16
