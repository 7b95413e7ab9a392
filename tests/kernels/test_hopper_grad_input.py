"""The Hopper kernel for dX computes the right numbers, run in `gluon_emulator` on the CPU."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fp8dispatch
from fp8dispatch.quantization.weight import block_of
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle
from tests.backends.cases import B200, H200

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8dispatch.kernels.hopper_grad_config import GradConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which exists for Linux"
)

LARGE = Recipe(Granularity.BLOCK, (192, 256))
WHOLE = Recipe(Granularity.BLOCK, (3000, 2900))
RECIPES = [BLOCK_128, ROW, TENSOR, LARGE, WHOLE]


@pytest.fixture(scope="module", autouse=True)
def memories() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The launcher over the emulated kernel on a device of three multiprocessors."""
    from fp8dispatch.kernels import (
        direct_launch,
        hopper_grad_input,
        hopper_grad_launch,
        hopper_grad_tile,
        hopper_tile,
    )
    from tests.kernels import gluon_emulator

    made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def memory(device: torch.device, elements: int, counters: int) -> Any:
        made.append((torch.full((elements,), math.nan), torch.zeros(counters, dtype=torch.int32)))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        modules = [hopper_grad_input, hopper_grad_tile, hopper_tile]
        for module, name, stand_in in gluon_emulator.replacements(modules):
            patch.setattr(module, name, stand_in, raising=False)
        patch.setattr(direct_launch.Kernel, "__call__", gluon_emulator.run)
        patch.setattr(direct_launch, "_kernels", {})
        patch.setattr(hopper_grad_launch, "workspace", memory)
        yield made


def run(
    m: int,
    n: int,
    k: int,
    recipe: Recipe = BLOCK_128,
    dtype: torch.dtype = torch.bfloat16,
    config: GradConfig | None = None,
) -> torch.Tensor:
    """One call against the truth; what it computed."""
    from fp8dispatch.kernels.hopper_grad_launch import grad_input, takes

    data, scale = oracle.make_weight(n, k, recipe)
    grad = torch.randn(m, n).to(dtype)
    block = block_of(recipe, n, k)
    grid = scale.float().reshape(-(-n // block[0]), -(-k // block[1]))
    out = torch.full((m, k), math.nan, dtype=dtype)
    assert takes(grad, data, grid, out, block)

    grad_input(grad, data, grid, out, block, config)

    label = f"{m}x{n}x{k} {recipe} {config}"
    oracle.assert_gradient(out, grad, oracle.dequantized_weight(data, scale, recipe), label=label)
    return out


def shape(block_m: int, tall: bool, split: int = 1, stages: int = 3) -> GradConfig:
    from fp8dispatch.kernels.hopper_grad_config import GradConfig

    return GradConfig(block_m, tall, stages, split=split, group_m=2)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_every_shape_and_recipe(block_m: int, tall: bool, recipe: Recipe) -> None:
    """Tails of M, N and K, several tiles a program, fewer steps than stages and more."""
    run(2 * block_m + 3, 328, 400, recipe, config=shape(block_m, tall))
    run(1, 8, 16, recipe, torch.float16, config=shape(block_m, tall))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("split", [2, 3, 5])
def test_a_split_adds_up_and_leaves_its_counters_zero(
    split: int, recipe: Recipe, memories: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for block_m, tall in ((16, False), (128, False), (64, True)):
        run(130, 712, 272, recipe, config=shape(block_m, tall, split))
        assert not memories[-1][1].any()


def test_a_split_has_no_empty_parts() -> None:
    run(3, 72, 16, config=shape(16, False, 5))


def test_a_split_does_not_depend_on_the_order_of_programs() -> None:
    """The emulator runs programs in any order."""
    results = []
    for _ in range(4):
        torch.manual_seed(5)
        results.append(run(20, 896, 128, config=shape(32, False, 5)))
    assert all(torch.equal(results[0], one) for one in results)


def test_a_weight_is_rounded_to_the_gradients_dtype() -> None:
    """The unit matrix reads the weight back as the product took it: as `dequantize` gives it."""
    from fp8dispatch.kernels.hopper_grad_launch import grad_input

    for dtype in (torch.bfloat16, torch.float16):
        data, scale = oracle.make_weight(128, 256, BLOCK_128)
        scale = scale.float() * 1.2345
        out = torch.empty(128, 256, dtype=dtype)

        grad_input(torch.eye(128, dtype=dtype), data, scale, out, (128, 128))

        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(out, (data.float() * spread).to(dtype))


def test_what_is_beyond_the_edges_is_neither_read_nor_written() -> None:
    from fp8dispatch.kernels.hopper_grad_launch import grad_input

    data, scale = oracle.make_weight(72, 144, BLOCK_128)
    canvas = torch.full((40, 256), math.nan, dtype=torch.bfloat16)
    weights = torch.full((100, 160), 0x7F, dtype=torch.uint8)
    weights[:72, :144] = data.view(torch.uint8)
    grads = torch.full((40, 80), math.nan, dtype=torch.bfloat16)
    grads[:21, :72] = torch.randn(21, 72)
    grad, out = grads[:21, :72], canvas[:21, 16:160]
    weight = weights[:72, :144].view(torch.float8_e4m3fn)

    grad_input(grad, weight, scale.float(), out, (128, 128))

    oracle.assert_gradient(out, grad, oracle.dequantized_weight(data, scale, BLOCK_128))
    assert canvas.isnan().sum().item() == canvas.numel() - out.numel()


@settings(max_examples=15, deadline=None)
@given(
    m=st.integers(1, 300),
    n=st.integers(1, 100).map(lambda eights: eights * 8),
    k=st.integers(1, 40).map(lambda blocks: blocks * 16),
    recipe=st.sampled_from(RECIPES),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_any_size_through_the_choice_of_a_shape(
    m: int, n: int, k: int, recipe: Recipe, dtype: torch.dtype
) -> None:
    run(m, n, k, recipe, dtype)


def test_sizes_and_blocks_that_are_left_to_the_portable_kernel() -> None:
    from fp8dispatch.kernels.hopper_grad_launch import takes_sizes

    for block in ((128, 128), (64, 256), (4096, 128), (128, 4096), (1, 4096), (4096, 4096), None):
        assert takes_sizes(4096, 4096, block), block
    for block in ((32, 128), (128, 64), (1, 128), (4096, 32)):
        assert not takes_sizes(4096, 4096, block), block
    assert not takes_sizes(4092, 4096, (128, 128))
    assert not takes_sizes(4096, 4088, (128, 128))


def test_tensors_that_are_left_to_the_portable_kernel() -> None:
    from fp8dispatch.kernels.hopper_grad_launch import takes

    data, scale = oracle.make_weight(64, 128, BLOCK_128)
    grad, out = torch.zeros(4, 64).bfloat16(), torch.zeros(4, 128).bfloat16()
    block = (64, 128)
    assert takes(grad, data, scale, out, block)
    assert not takes(grad.float(), data, scale, out.float(), block)
    assert not takes(grad, data, scale, out.half(), block)
    assert not takes(grad[:1].expand(4, 64), data, scale, out, block)
    assert not takes(torch.zeros(64, 4).bfloat16().t(), data, scale, out, block)
    assert not takes(torch.zeros(4, 65).bfloat16()[:, 1:], data, scale, out, block)
    transposed = torch.zeros(128, 64, dtype=torch.uint8).view(data.dtype).t()
    assert not takes(grad, transposed, scale, out, block)
    e5m2 = data.view(torch.uint8).view(torch.float8_e5m2)
    assert not takes(grad, e5m2, scale, out, block)


def test_backward_takes_the_kernel_first_and_others_where_it_does_not_suit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fp8dispatch import dequantized_grad
    from fp8dispatch.dequantized_grad import Way
    from fp8dispatch.kernels import grad_input, hopper_grad_launch

    ran: list[str] = []
    for module in (grad_input, hopper_grad_launch):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "grad_input", lambda *_, name=name: ran.append(name))
    monkeypatch.setattr(dequantized_grad, "ways", lambda *_: (Way.GLUON, Way.TRITON, Way.STRIPS))
    monkeypatch.setattr(dequantized_grad, "runs_gluon", lambda device: True)

    def backward(n: int, k: int) -> None:
        data, scale = oracle.make_weight(n, k, BLOCK_128)
        dequantized_grad.grad_input(torch.zeros(3, n).bfloat16(), data, scale.float(), BLOCK_128)

    backward(128, 256)
    backward(100, 256)

    assert ran == ["hopper_grad_launch", "grad_input"]
    sentence = dequantized_grad.sentence(3, 128, 256, torch.device("cpu"), torch.bfloat16)
    assert sentence.endswith(
        "by a Gluon kernel, or a Triton kernel where strides or scales do not suit that"
    )


def test_where_the_kernel_cannot_be_compiled_the_next_way_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A first call inside of a captured graph."""
    from fp8dispatch import dequantized_grad
    from fp8dispatch.dequantized_grad import Way
    from fp8dispatch.errors import BackendUnavailableError
    from fp8dispatch.kernels import hopper_grad_launch

    def capturing(*_: object) -> None:
        raise BackendUnavailableError("a graph is being captured")

    monkeypatch.setattr(hopper_grad_launch, "grad_input", capturing)
    monkeypatch.setattr(dequantized_grad, "ways", lambda *_: (Way.GLUON, Way.STRIPS))
    monkeypatch.setattr(dequantized_grad, "runs_gluon", lambda device: True)
    before = fp8dispatch.stats()["cold_in_capture"]
    data, scale = oracle.make_weight(128, 256, BLOCK_128)
    grad = torch.randn(3, 128).bfloat16()

    got = dequantized_grad.grad_input(grad, data, scale.float(), BLOCK_128)

    oracle.assert_gradient(got, grad, oracle.dequantized_weight(data, scale, BLOCK_128))
    assert fp8dispatch.stats()["cold_in_capture"] == before + 1
    assert "run a backward pass of that size once before capturing" in caplog.text
    with pytest.raises(BackendUnavailableError, match="a graph is being captured"):
        dequantized_grad.grad_input(grad, data, scale.float(), BLOCK_128, Way.GLUON)


def test_it_runs_only_with_a_triton_that_it_was_seen_to_run_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gradient has no canary: what is not known to be right stays with torch."""
    from fp8dispatch import dequantized_grad, registry
    from fp8dispatch.dequantized_grad import Way
    from fp8dispatch.errors import BackendUnavailableError

    monkeypatch.setattr(type(registry.load("gluon")), "loadable", lambda self, recipe: ())
    for machine, version, runs in ((H200, "3.6.0", True), (H200, "3.7.1", False),
                                   (B200, "3.6.0", False)):  # fmt: skip
        here = replace(machine, versions={**machine.versions, "triton": version})
        monkeypatch.setattr(dequantized_grad, "describe", lambda device, here=here: here)
        dequantized_grad.runs_gluon.cache_clear()
        assert dequantized_grad.runs_gluon(torch.device("cuda", 0)) is runs
    dequantized_grad.runs_gluon.cache_clear()
    data, scale = oracle.make_weight(128, 256, BLOCK_128)
    with pytest.raises(BackendUnavailableError, match="needs a Hopper GPU"):
        dequantized_grad.grad_input(
            torch.zeros(3, 128).bfloat16(), data, scale.float(), BLOCK_128, Way.GLUON
        )
    dequantized_grad.runs_gluon.cache_clear()
