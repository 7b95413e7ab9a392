"""The canary passes what is right and catches each fault that FP8 backends are known for."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.eager import Eager
from fp8dispatch.probes.numerics import CanaryResult, run_canary
from fp8dispatch.problem import Accuracy
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Recipe
from tests import oracle
from tests.probes import planted
from tests.probes.planted import Planted

CPU = torch.device("cpu")


def canary(backend: Backend, recipe: Recipe = BLOCK_128) -> CanaryResult:
    return run_canary(backend, CPU, recipe)


@pytest.mark.parametrize("recipe", oracle.RECIPES)
def test_plain_torch_is_right(recipe: str) -> None:
    result = canary(Eager(), oracle.RECIPES[recipe])
    assert result.right, result.reason
    assert 0 < result.worst <= 1


@pytest.mark.unpoisoned  # the canary itself leaves NaN in the memory of the output
@pytest.mark.parametrize(
    "fault",
    [
        planted.swapped_operands,
        planted.transposed_weight_scale,
        planted.transposed_activation_scale,
        planted.reciprocal_scale,
        planted.rounded_up_scale,
        planted.rounded_activation_scale,
        planted.missing_bias,
        planted.double_bias,
        planted.missing_bias_in_fp16,
        planted.unwritten_tail,
        planted.unwritten_columns,
        planted.constant,
        planted.zeros,
        planted.uninitialised,
        planted.first_result_for_ever,
        planted.wrong_block_size,
        planted.padded_groups,
        planted.dropped_last_group,
        planted.nan_for_zero_row,
        planted.scaled_data_in_place,
        planted.one_element_off,
        planted.wrong_dtype,
        planted.wrong_device,
        planted.wrong_shape,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_fault_is_caught(fault: planted.Fault) -> None:
    result = canary(Planted(fault))
    assert not result.right
    assert result.applicable
    assert "\n" not in result.reason


@pytest.mark.unpoisoned
@pytest.mark.parametrize("recipe", [TENSOR, ROW], ids=str)
@pytest.mark.parametrize(
    "fault",
    [
        planted.swapped_operands,
        planted.reciprocal_scale,
        planted.rounded_up_scale,
        planted.rounded_activation_scale,
        planted.missing_bias,
        planted.double_bias,
        planted.unwritten_tail,
        planted.constant,
        planted.uninitialised,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_fault_is_caught_without_blocks(fault: planted.Fault, recipe: Recipe) -> None:
    assert not canary(Planted(fault), recipe).right


def test_a_quantiser_of_its_own_is_held_to_the_recipe() -> None:
    """One scale for each token where the recipe has one for each 128 columns."""

    class Coarse(Eager):
        def linear(self, x, weight, bias, activation_scale, problem):
            by_token = super().linear(
                x, _as_rows(weight), None, activation_scale, problem
            )  # the product of x quantised by token
            return by_token if bias is None else (by_token + bias).to(by_token.dtype)

    def _as_rows(weight):
        wide = oracle.dequantized_weight(weight.data, weight.scale, weight.recipe).float()
        scale = wide.abs().amax(1, keepdim=True) / 448
        return weight._replace(data=(wide / scale).to(weight.data.dtype), scale=scale, recipe=ROW)

    assert not canary(Coarse()).right


def test_noise_that_each_element_may_have_is_not_for_every_element() -> None:
    """A quantiser of the backend's own may move a code here and there, not all of them."""

    class Noisy(Eager):
        def linear(self, x, weight, bias, activation_scale, problem):
            out = super().linear(x, weight, bias, activation_scale, problem)
            sign = torch.arange(out.numel()).reshape(out.shape) % 2 * 2 - 1
            product = out.float() if bias is None else out.float() - bias
            rms = product.square().mean(1, keepdim=True).sqrt()
            return (out + 0.04 * sign * rms).to(out.dtype)

    result = canary(Noisy(), TENSOR)
    assert not result.right
    assert "dB, needs 33 dB" in result.reason


def test_the_accuracy_class_sets_the_bound() -> None:
    """Fast accumulation is right where it is declared, and wrong where exact is."""
    assert canary(planted.FAST, ROW).right
    assert not canary(Planted(planted.fast_accumulation), ROW).right
    both = frozenset({Accuracy.EXACT, Accuracy.FAST})

    def fast_when_allowed(eager, x, weight, bias, problem):
        if problem.accuracy is Accuracy.FAST:
            return planted.fast_accumulation(eager, x, weight, bias, problem)
        return eager.matmul(x, weight, bias, problem)

    assert canary(Planted(fast_when_allowed, accuracies=both), ROW).right


def test_sizes_that_a_backend_refuses_are_replaced() -> None:
    right = planted.OnlyAligned()
    assert canary(right).right
    assert right.calls > 3
    assert not canary(planted.OnlyAligned(planted.rounded_up_scale)).right


@pytest.mark.parametrize("quantized", [False, True], ids=["linear", "matmul"])
def test_a_fault_in_the_kernel_of_one_size_is_caught_where_the_size_is_named(
    quantized: bool,
) -> None:
    """The canary's own sizes never have fewer than 65 rows where a backend takes them."""

    class Small(Eager):
        """Two kernels, of which the one for few rows is wrong on one entry."""

        def linear(self, x, weight, bias, activation_scale, problem):
            out = super().linear(x, weight, bias, activation_scale, problem)
            return out * 2 if problem.m <= 64 and not quantized else out

        def matmul(self, x, weight, bias, problem):
            out = super().matmul(x, weight, bias, problem)
            return out * 2 if problem.m <= 64 and quantized else out

    class Named(Small):
        canary_sizes = ((5, 40, 144),)

    assert canary(Small()).right
    result = canary(Named())
    assert not result.right
    assert "M=5 N=40 K=144" in result.reason


def test_each_format_that_meets_the_same_activations_is_tested() -> None:
    class Mixed(Eager):
        """Wrong where the weight is not in the format of the activations."""

        def matmul(self, x, weight, bias, problem):
            out = super().matmul(x, weight, bias, problem)
            return out * 2 if problem.weight_dtype == "float8_e5m2" else out

    result = canary(Mixed())
    assert not result.right
    assert "float8_e5m2 weight" in result.reason


def test_a_named_size_that_is_refused_is_left_out() -> None:
    backend = planted.OnlyAligned()
    backend.canary_sizes = ((1, 3, 5),)
    assert canary(backend).right


def test_a_backend_that_refuses_everything_is_not_applicable() -> None:
    result = canary(planted.REFUSES)
    assert not result.applicable
    assert not result.right
    assert result.reason.startswith("not applicable: planted needs a")

    elsewhere = canary(Planted(capabilities=((9, 0),)))
    assert not elsewhere.applicable
    assert "capability 9.0" in elsewhere.reason


def test_only_what_is_declared_is_asked() -> None:
    backend = Planted(
        lambda eager, *call: (
            eager.matmul(*call) if call[3].out_dtype == "float16" else torch.zeros(0)
        ),
        out_dtypes=frozenset({"float16"}),
        weight_dtypes=frozenset({"float8_e4m3fnuz"}),
    )
    result = canary(backend)
    assert result.right, result.reason


def test_errors_are_the_callers() -> None:
    with pytest.raises(RuntimeError, match="no kernel image"):
        canary(planted.RAISES)


def test_the_surroundings_are_left_alone_and_change_nothing() -> None:
    plain = canary(Eager())
    state = torch.get_rng_state()
    x = torch.ones(1, requires_grad=True)

    def no_gradients(eager, *call):
        assert not torch.is_grad_enabled()
        return eager.matmul(*call)

    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            inside = canary(Planted(no_gradients))
            assert torch.is_autocast_enabled("cpu")
            assert (x * 2).requires_grad
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert canary(Eager()) == plain

    assert inside == plain
    assert torch.equal(torch.get_rng_state(), state)
