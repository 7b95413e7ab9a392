"""A repeated call skips the checks, and whatever changed since is noticed all the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fp8dispatch
from fp8dispatch import FP8Linear, decide, execute, fp8_linear, linear, plans, registry
from fp8dispatch.errors import (
    BackendUnavailableError,
    DTypeError,
    FrozenWeightError,
    InvalidInputError,
    ScaleValueError,
    ShapeError,
    UnsupportedTransformError,
)
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Recipe
from tests import oracle

N, K = 256, 384


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call that goes through the checks."""
    calls: list[int] = []
    original: Any = linear.check_operands

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(linear, "check_operands", counting)
    return calls


def operands(recipe: Recipe = BLOCK_128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, scale = oracle.make_weight(N, K, recipe)
    return torch.randn(3, K), weight, scale


def expected(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What a call computes that has never been seen: over clones."""
    return fp8_linear(x, weight.clone(), scale.clone())


def test_a_repeated_call_is_neither_described_nor_decided_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight, scale = operands()
    first = fp8_linear(x, weight, scale)
    monkeypatch.setattr(decide, "decide", None)
    monkeypatch.setattr(execute, "decide", None)
    monkeypatch.setattr(execute, "describe_call", None)
    calls = decide.stats()["calls"]

    assert torch.equal(fp8_linear(x, weight, scale), first)
    assert decide.stats()["calls"] == calls + 1
    with pytest.raises(TypeError):  # another number of rows has to be decided
        fp8_linear(x[:2], weight, scale)


@pytest.mark.parametrize("recipe", [BLOCK_128, ROW, TENSOR], ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
def test_a_repeated_call_is_not_checked_again_and_computes_the_same(
    recipe: Recipe, static: bool, bias: torch.dtype | None, checked: list[int]
) -> None:
    x, weight, scale = operands(recipe)
    others: dict[str, Any] = {
        "bias": None if bias is None else torch.randn(N).to(bias),
        "activation_scale": torch.tensor([0.02]) if static else None,
        "block_size": recipe.block_size,
    }
    first = fp8_linear(x, weight, scale, **others)
    fp8_linear(x[:2], weight, scale, **others)
    truth = oracle.truth(
        oracle.dequantized_activations(x, recipe, activation_scale=others["activation_scale"]),
        oracle.dequantized_weight(weight, scale, recipe),
        others["bias"],
    )
    for _ in range(2):
        again = fp8_linear(x, weight, scale, **others)
        assert torch.equal(again, first)
        oracle.assert_matches(again, truth, label=str(recipe))
    for shape in ((1, 3, K), (3, 1, 1, K)):
        out = fp8_linear(x.view(shape), weight, scale, **others)
        assert torch.equal(out, first.view(*shape[:-1], N))
    # One row alone is summed in another order.
    torch.testing.assert_close(fp8_linear(x[0], weight, scale, **others), first[0])
    assert fp8_linear(x[:0], weight, scale, **others).shape == (0, N)
    strided = torch.zeros(3, 2 * K)[:, ::2].copy_(x)
    assert torch.equal(fp8_linear(strided, weight, scale, **others), first)

    assert len(checked) == 1


def in_place(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    scale.mul_(2)


def other_memory(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    scale.data = scale * 3


def other_weight_memory(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    weight.data = weight.flip(0)


def weight_values(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    weight.view(torch.uint8).zero_()


def behind_the_back(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    scale.detach().numpy()[:] *= 2
    fp8dispatch.invalidate(scale)


@pytest.mark.parametrize(
    "change", [in_place, other_memory, other_weight_memory, weight_values, behind_the_back]
)
def test_a_changed_weight_or_scale_is_noticed(change: Callable[..., None]) -> None:
    x, weight, scale = operands()
    before = fp8_linear(x, weight, scale)
    change(x, weight, scale)

    after = fp8_linear(x, weight, scale)
    assert not torch.equal(after, before)
    assert torch.equal(after, expected(x, weight, scale))


def test_a_scale_that_turned_bad_is_refused_again() -> None:
    x, weight, scale = operands()
    fp8_linear(x, weight, scale)
    scale[0, 0] = float("nan")
    with pytest.raises(ScaleValueError):
        fp8_linear(x, weight, scale)


def test_memory_that_comes_back_to_the_same_address_is_read_anew() -> None:
    """``.data`` is assigned twice between calls: torch may hand out the first address again."""
    x, weight, scale = operands()
    fp8_linear(x, weight, scale)
    for factor in (2.0, 5.0, 7.0):
        values = scale * factor
        scale.data = torch.empty_like(scale)
        scale.data = values
        del values
        assert torch.equal(fp8_linear(x, weight, scale), expected(x, weight, scale))


def test_a_weight_turned_in_place_is_read_the_new_way() -> None:
    weight, scale = oracle.make_weight(256, 256, BLOCK_128)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x = torch.randn(3, 256)
    fp8_linear(x, weight, scale)
    weight.t_()
    assert torch.equal(fp8_linear(x, weight, scale), expected(x, weight, scale))
    scale.t_()
    assert torch.equal(fp8_linear(x, weight, scale), expected(x, weight, scale))


@pytest.mark.parametrize("inference", [False, True])
def test_other_sizes_over_the_same_memory_are_noticed(inference: bool) -> None:
    """Version counters do not tell: assigning ``.data`` keeps them, inference tensors have none."""
    with torch.inference_mode(inference):
        x, weight, scale = operands(ROW)
        fp8_linear(x, weight, scale)
        weight.data = weight.data[:128]
        scale.data = scale.data[:128]
        assert torch.equal(fp8_linear(x, weight, scale), expected(x, weight, scale))
        weight.data = weight.data.view(384, 128)
        scale.data = scale.data[:1]
        x = x[:, :128].contiguous()
        assert torch.equal(fp8_linear(x, weight, scale), expected(x, weight, scale))


def test_other_strides_over_the_same_memory_are_noticed() -> None:
    weight, scale = oracle.make_weight(128, 128, TENSOR)
    x = torch.randn(3, 128)
    fp8_linear(x, weight, scale)
    weight.data = weight.data.t()
    with fp8dispatch.use_backend("eager"):
        assert fp8dispatch.explain(x, weight, scale).problem.weight_row_major is False
    assert torch.equal(fp8_linear(x, weight, scale), expected(x, weight, scale))
    problems = [known[0] for plan in plans._plans.values() for known in plan.by_rows.values()]
    assert not problems[-1].weight_row_major, "a backend is told how the weight really lies"


def test_a_transposed_weight_is_taken_in_every_call(checked: list[int]) -> None:
    x, weight, scale = operands(ROW)
    first = fp8_linear(x, weight.t(), scale)
    assert torch.equal(fp8_linear(x, weight.t(), scale), first)
    turned = weight.t()
    for _ in range(2):
        assert torch.equal(fp8_linear(x, turned, scale), first)


def test_a_bias_is_read_in_every_call() -> None:
    x, weight, scale = operands()
    bias = torch.zeros(N)
    before = fp8_linear(x, weight, scale, bias)
    with torch.no_grad():
        bias += 1
    assert torch.allclose(fp8_linear(x, weight, scale, bias), before + 1)
    bias.data = torch.full((N,), 2.0)
    assert torch.allclose(fp8_linear(x, weight, scale, bias), before + 2)
    assert torch.equal(fp8_linear(x, weight, scale), before)
    bias.data = torch.zeros(N - 1)
    with pytest.raises(ShapeError):
        fp8_linear(x, weight, scale, bias)


def test_a_changed_activation_scale_is_noticed() -> None:
    x, weight, scale = operands(TENSOR)
    static = torch.tensor([0.02])
    before = fp8_linear(x, weight, scale, activation_scale=static)
    static.mul_(0.25)  # saturates
    after = fp8_linear(x, weight, scale, activation_scale=static)
    assert not torch.equal(after, before)
    dynamic = fp8_linear(x, weight, scale)
    assert not torch.equal(dynamic, after)
    assert torch.equal(fp8_linear(x, weight, scale, activation_scale=static), after)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda x: x[:, :-1], ShapeError),
        (lambda x: x.double(), DTypeError),
        (lambda x: x.to_sparse(), DTypeError),
        (lambda x: torch.nested.nested_tensor([x, x]), DTypeError),
        (lambda x: torch.tensor(1.0), ShapeError),
        (lambda x: x.tolist(), DTypeError),
        (lambda x: x.to("meta"), InvalidInputError),
    ],
)
# Nested tensors say that they are a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_bad_activations_after_good_ones_raise_as_ever(
    bad: Callable[[torch.Tensor], Any], error: type[Exception]
) -> None:
    x, weight, scale = operands()
    fp8_linear(x, weight, scale)
    fp8_linear(x, weight, scale)
    with pytest.raises(error):
        fp8_linear(bad(x), weight, scale)


# Torch itself, where forward mode is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms_after_a_plain_call_are_refused_as_ever() -> None:
    x, weight, scale = operands()
    fp8_linear(x, weight, scale)
    with pytest.raises(UnsupportedTransformError):
        torch.func.vmap(lambda one: fp8_linear(one, weight, scale))(x)
    with pytest.raises(UnsupportedTransformError), forward_ad.dual_level():
        fp8_linear(forward_ad.make_dual(x, x), weight, scale)


def test_statements_of_policy_are_heard_in_a_repeated_call(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("eager", "triton"):
        backend = registry.load(name)

        def watched(*arguments: Any, name: str = name, call: Any = backend.matmul) -> torch.Tensor:
            used.append(name)
            out: torch.Tensor = call(*arguments)
            return out

        monkeypatch.setattr(backend, "matmul", watched)
    x, weight, scale = operands()
    for _ in range(2):
        fp8_linear(x, weight, scale)
        fp8_linear(x, weight, scale, backend="triton")
        with fp8dispatch.use_backend("triton"):
            fp8_linear(x, weight, scale)
        fp8dispatch.set_backend("triton")
        fp8_linear(x, weight, scale)
        fp8dispatch.set_backend()
        monkeypatch.setenv("FP8DISPATCH_BACKEND", "triton")
        fp8dispatch.reload_environment()
        fp8_linear(x, weight, scale)
        monkeypatch.delenv("FP8DISPATCH_BACKEND")
        fp8dispatch.reload_environment()
        with pytest.raises(BackendUnavailableError):
            fp8_linear(x, weight, scale, backend="cublaslt")
    assert used == ["eager", "triton", "triton", "triton", "triton"] * 2


def test_the_output_dtype_follows_the_arguments_and_autocast() -> None:
    x, weight, scale = operands()
    for _ in range(2):
        assert fp8_linear(x, weight, scale).dtype == torch.float32
        assert fp8_linear(x, weight, scale, out_dtype=torch.float16).dtype == torch.float16
        assert fp8_linear(x.bfloat16(), weight, scale).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fp8_linear(x, weight, scale).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.float16):
            assert fp8_linear(x, weight, scale).dtype == torch.float16
        with pytest.raises(InvalidInputError):
            fp8_linear(x, weight, scale, out_dtype=torch.float64)


def test_gradients_of_a_repeated_call(checked: list[int]) -> None:
    x, weight, scale = operands()
    bias = torch.zeros(N, requires_grad=True)
    fp8_linear(x, weight, scale, bias)
    x.requires_grad_()
    gradients = []
    for _ in range(2):
        out = fp8_linear(x, weight, scale, bias)
        gradients.append(torch.autograd.grad(out.square().sum(), (x, bias)))
    dense = oracle.dequantized_weight(weight, scale, BLOCK_128).to(torch.float64)
    dy = 2 * out.detach().double()
    for dx, db in gradients:
        torch.testing.assert_close(dx.double(), dy @ dense, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(db.double(), dy.sum(0), rtol=1e-5, atol=1e-4)
    assert len(checked) == 1
    scale.requires_grad_()
    with pytest.raises(FrozenWeightError):
        fp8_linear(x, weight, scale, bias).sum().backward()


def test_a_backend_that_fails_in_a_repeated_call_is_put_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight, scale = operands()
    with fp8dispatch.use_backend("triton,eager"):
        good = fp8_linear(x, weight, scale)
        fp8_linear(x, weight, scale)

        def broken(*_: Any) -> torch.Tensor:
            raise RuntimeError("kernel launch failed")

        monkeypatch.setattr(registry.load("triton"), "matmul", broken)
        with pytest.warns(RuntimeWarning, match="triton failed on"):
            out = fp8_linear(x, weight, scale)
        assert torch.allclose(out, good, atol=1e-2)
        fp8_linear(x, weight, scale)  # a second warning would be an error here
    monkeypatch.setattr(registry.load("eager"), "matmul", broken)
    with pytest.raises(RuntimeError, match="kernel launch failed"):
        fp8_linear(x, weight, scale, backend="eager")
    fp8dispatch.trust.release()


def test_lists_as_block_sizes_stay_allowed(checked: list[int]) -> None:
    x, weight, scale = operands()
    for _ in range(2):
        fp8_linear(x, weight, scale, block_size=[128, 128])
    assert len(checked) == 2, "a list may change, so it is read in every call"


def test_plans_die_with_their_weights_and_hold_no_memory() -> None:
    gc.collect()
    before = plans.count()
    alive: list[int] = []
    for _ in range(5):
        x, weight, scale = operands()
        layer = FP8Linear.from_tensors(weight, scale)
        layer(x)
        layer(x)
        alive.append(plans.count() - before)
    assert max(alive) >= 1, "there was a plan to drop"
    del layer, weight, scale
    gc.collect()
    assert plans.count() <= before


def test_scales_and_biases_made_anew_leave_no_plans_behind() -> None:
    x, weight, scale = operands()
    gc.collect()
    before = plans.count()
    kept = []
    for _ in range(10):
        bias = torch.zeros(N)
        kept.append(torch.zeros(1))  # so that the next bias is another object
        fp8_linear(x, weight, scale.view(scale.shape), bias)
        kept.append(bias.sum())
        del bias
    gc.collect()
    assert plans.count() <= before


def test_inference_tensors_are_taken(checked: list[int]) -> None:
    with torch.inference_mode():
        x, weight, scale = operands()
        first = fp8_linear(x, weight, scale)
        assert torch.equal(fp8_linear(x, weight, scale), first)
        scale.mul_(2)
        fp8dispatch.invalidate(scale)
        assert not torch.equal(fp8_linear(x, weight, scale), first)


def test_a_module_that_moves_to_another_dtype_takes_its_new_bias() -> None:
    x, weight, scale = operands()
    layer = FP8Linear.from_tensors(weight, scale, nn.Parameter(torch.randn(N)))
    with torch.no_grad():
        first = layer(x)
        layer.to(torch.bfloat16)
        assert layer.bias is not None
        assert layer.bias.dtype == torch.bfloat16
        again = layer(x)
    assert torch.equal(again, fp8_linear(x, weight, scale, layer.bias.detach().clone()))
    assert not torch.equal(again, first)
