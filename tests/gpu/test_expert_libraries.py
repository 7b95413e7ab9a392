"""Expert matmuls of other libraries on the GPU, each where its library is installed and loads.

Each first call is in a child process, since their native code has not been seen to run yet. FBGEMM
and MSLK are not loaded into one process: run the file once with ``-k "not mslk"`` and once with
``-k mslk``.
"""

from __future__ import annotations

import pytest
import torch

import fp8dispatch
from fp8dispatch import registry, trust
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.moe.backends.contract import ExpertBackend
from fp8dispatch.probes.device import describe
from fp8dispatch.problem import Accuracy
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle
from tests.gpu import synchronisation
from tests.moe.cases import RECIPES, WAYS, Call, make_call

pytestmark = [
    pytest.mark.gpu,
    # What these libraries and their dependencies warn of at import is theirs.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),  # an error of this kind ends an import
]

CUDA = torch.device("cuda")
NAMES = ("deepgemm", "fbgemm", "mslk", "cutlass")
SHAPES = ((256, 384), (272, 400), (264, 400), (260, 396))
"""N and K: whole blocks; multiples of 16; N of 8; neither."""


def recipe_of(name: str) -> Recipe:
    """One that the backend takes."""
    return ROW if name == "cutlass" else BLOCK_128


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> ExpertBackend:
    """A backend that runs here; the others skip with their refusal."""
    one = registry.load_experts(request.param)
    reasons = one.refuse_machine(describe(CUDA)) or one.loadable(recipe_of(one.name))
    if reasons:
        pytest.skip("; ".join(f"{one.name} {reason}" for reason in reasons))
    return one


def takes(name: str, recipe: Recipe, n: int, k: int, accuracy: Accuracy) -> bool:
    """What the documentation of the backend promises to run."""
    rows = recipe.granularity is not Granularity.BLOCK
    if not rows and recipe != BLOCK_128:
        return False
    if name == "deepgemm":
        return not rows and n % 8 == 0 and k % 16 == 0
    if name == "cutlass":
        return rows and n % 16 == 0 and k % 16 == 0
    if rows:
        return accuracy is Accuracy.FAST and n % 8 == 0 and k % 16 == 0
    return n % 128 == 0 and k % 128 == 0


def check(call: Call, name: str, accuracy: Accuracy = Accuracy.EXACT) -> None:
    """The backend computes the call within its bounds."""
    with fp8dispatch.use_backend(name, accuracy=accuracy.value):
        out = call.run()
    fast = accuracy is Accuracy.FAST
    bound = oracle.FAST_ACCUMULATION if fast else oracle.EXACT_ACCUMULATION
    oracle.assert_matches(out, call.truth(), accumulation=bound, min_sqnr=40 if fast else 45)


@pytest.mark.parametrize("recipe", [BLOCK_128, ROW, TENSOR], ids=str)
def test_the_canary_is_right(backend: ExpertBackend, recipe: Recipe) -> None:
    if recipe.granularity not in backend.recipes:
        pytest.skip(f"{backend.name} does not take {recipe}")
    name, machine = f"experts.{backend.name}", describe(CUDA)

    verdict = trust.judge(name, backend, CUDA, machine, recipe, may_probe=True)

    assert verdict.state == "right", verdict.reason


@pytest.mark.parametrize("accuracy", Accuracy)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_numbers_within_bounds_or_a_refusal(
    backend: ExpertBackend, recipe: Recipe, accuracy: Accuracy
) -> None:
    for n, k in SHAPES:
        for way in WAYS:
            call = make_call(way, recipe, 5, n, k, 150, device="cuda")
            if takes(backend.name, recipe, n, k, accuracy):
                check(call, backend.name, accuracy)
                continue
            with (
                fp8dispatch.use_backend(backend.name, accuracy=accuracy.value),
                pytest.raises(BackendUnavailableError, match=f"{backend.name} needs"),
            ):
                call.run()


@pytest.mark.parametrize("experts", [1, 3, 60, 256])
@pytest.mark.parametrize(
    ("sentinels", "concentrated"), [(0.0, False), (0.0, True), (0.9, False), (1.1, False)]
)
def test_any_routing(
    backend: ExpertBackend, experts: int, sentinels: float, concentrated: bool
) -> None:
    """Empty experts, all rows on one, and none on any: a wrong size would end the CUDA context."""
    recipe = recipe_of(backend.name)
    for way in ("batched", "grouped-index"):
        for rows in (1, 17, 130, 300):
            call = make_call(
                way, recipe, experts, 256, 384, rows,
                sentinels=sentinels, concentrated=concentrated, device="cuda",
            )  # fmt: skip
            check(call, backend.name)
    torch.cuda.synchronize()


def test_static_activations(backend: ExpertBackend) -> None:
    recipe = recipe_of(backend.name)
    check(make_call("batched", recipe, 6, 256, 384, 90, static="one", device="cuda"), backend.name)
    call = make_call("grouped", recipe, 6, 256, 384, 90, static="each", device="cuda")
    with pytest.raises(BackendUnavailableError, match="one activation scale for all experts"):
        call.run(backend=backend.name)


@pytest.mark.parametrize("way", ["batched", "grouped"])
def test_a_captured_call_follows_new_routing(backend: ExpertBackend, way: str) -> None:
    call = make_call(way, recipe_of(backend.name), 8, 256, 512, 64, device="cuda")
    name = "expert_ids" if way == "batched" else "offsets"
    held = call.arguments[name].clone()
    call.arguments[name] = held
    call.run(backend=backend.name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run(backend=backend.name)
    for _ in range(3):
        if way == "batched":
            held.copy_(torch.randint(-1, 9, held.shape, device="cuda"))
        else:
            held.copy_(torch.randint(0, 65, held.shape, device="cuda").sort().values)
        graph.replay()
        assert torch.equal(out, call.run(backend=backend.name))


@pytest.mark.parametrize("way", WAYS)
def test_a_second_call_does_not_synchronise(backend: ExpertBackend, way: str) -> None:
    call = make_call(way, recipe_of(backend.name), 8, 256, 512, 64, device="cuda")
    expected = call.run(backend=backend.name)
    with synchronisation.forbidden():
        again = call.run(backend=backend.name)
    assert torch.equal(again, expected)


def test_a_side_stream_gives_the_same_numbers(backend: ExpertBackend) -> None:
    call = make_call("grouped", recipe_of(backend.name), 8, 256, 512, 64, device="cuda")
    expected = call.run(backend=backend.name)
    x = call.arguments["x"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a launch on another stream would now read too early
        on_side = call.run(backend=backend.name, x=torch.zeros_like(x).copy_(x))
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    assert torch.equal(on_side, expected)


def test_a_non_finite_row_stays_alone(backend: ExpertBackend) -> None:
    call = make_call(
        "batched", recipe_of(backend.name), 4, 256, 384, 40, sentinels=0, device="cuda"
    )
    clean = call.run(backend=backend.name)
    call.arguments["x"][5, 300] = float("nan")
    dirty = call.run(backend=backend.name)

    assert not torch.isfinite(dirty[5]).any()
    assert torch.equal(torch.cat([dirty[:5], dirty[6:]]), torch.cat([clean[:5], clean[6:]]))


def test_a_weight_is_never_copied(backend: ExpertBackend) -> None:
    """What a call of few rows allocates stays far below its weights."""
    call = make_call("grouped", recipe_of(backend.name), 16, 2048, 2048, 3, device="cuda")
    call.run(backend=backend.name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call.run(backend=backend.name)

    weights = call.arguments["weight"].numel()
    assert torch.cuda.max_memory_allocated() - before < weights // 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(backend: ExpertBackend) -> None:
    assert torch.cuda.current_device() == 0
    call = make_call("grouped", recipe_of(backend.name), 6, 256, 384, 90, device="cuda:1")

    check(call, backend.name)
    assert torch.cuda.current_device() == 0
