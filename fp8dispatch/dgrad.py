"""FP8 dgrad: dX [M, K] = dY [M, N] @ W [N, K] as an FP8 GEMM, where ``dgrad="fp8"`` is stated.

It is a linear over dY with the transposed weight [K, N], so it takes the same way as a forward
call: recipe, routes, refusals, canary, quarantine. dY is quantised per call and without a static
scale, to the format of activations (e4m3, as in the training of DeepSeek-V3). Sums over N then run
along rows of the transposed weight, and with them the scales:

| recipe of W         | scales of the transposed weight | dY                                       |
|---------------------|---------------------------------|------------------------------------------|
| tensor              | the same one                    | one scale per token                      |
| row, s[n]           | one, the largest s              | times s[n] / largest in fp32, then alike |
| block bn x bk       | the grid transposed, bk x bn    | one scale per token and bn columns       |
| group 1 x g         | one for each n of the sum: no FP8 GEMM has that; refused                   |

Tensor cores of Hopper read both FP8 operands along the summed dimension, so the transposed bytes
are a layout of their own: as many again as the weight has, made at the first backward and kept
with the weight (`prepared`). No copy is made where the weight came transposed, or where the backend
reads any strides alike (`Capability.any_strides`).

What it costs in accuracy: e4m3 rounds dY to 3 bits of mantissa, about 31.5 dB for normal values,
against the exact product of dY and the FP8 weight. Values below 2**-18 of the largest in their
group vanish, as in every activation; and so does a group whose largest |dY| is below about 2e-18,
since no scale is below 1e-12 / 448: scale the loss where gradients are that small.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from fp8dispatch import execute, registry
from fp8dispatch.checks import unwrapped
from fp8dispatch.decide import decide
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.execute import LinearCall, describe_call
from fp8dispatch.policy import Policy
from fp8dispatch.prepare import prepared, weight_scale_fp32
from fp8dispatch.problem import Dgrad, LinearProblem
from fp8dispatch.recipe import TENSOR, Granularity, Recipe
from fp8dispatch.router import Decision

P = TypeVar("P", bound=LinearProblem)


class _Scales(NamedTuple):
    """What multiplies what: ``dX = (dY * fold) @ (W.T as the recipe and scale say)``."""

    fold: torch.Tensor | None
    scale: torch.Tensor


def transposed_recipe(recipe: Recipe) -> Recipe:
    """What the scales of the transposed weight mean.

    Raises:
        BackendUnavailableError: a group recipe.
    """
    if recipe.block_size is None:
        return TENSOR
    rows, columns = recipe.block_size
    if rows == 1:
        raise BackendUnavailableError(
            f'dgrad="fp8" needs a weight with one scale per tensor, per row or per block of '
            f"several rows, found groups ({recipe}), whose scales differ at every step of dX's "
            f'sum; state dgrad="dequantized" for this layer'
        )
    return Recipe(Granularity.BLOCK, (columns, rows))


def explain(
    m: int, weight: torch.Tensor, recipe: Recipe, dtype: torch.dtype, allowed: Policy
) -> Decision:
    """Which backend computes dX; asked before the forward pass runs, so that a refusal comes then.

    Args:
        m: rows of dY.
        weight: [N, K], any strides.
        recipe: what its scale means.
        dtype: of dX.
        allowed: the policy of the forward call.

    Raises:
        BackendUnavailableError: the recipe has no FP8 dgrad, or every allowed backend refused.
    """
    call = _call(recipe, dtype, allowed)
    problem = describe_call(m, weight.t(), call, None, False)
    return decide(laid_out(problem, weight), weight.device, allowed)


def admit(x: torch.Tensor, weight: torch.Tensor, recipe: Recipe, allowed: Policy) -> None:
    """Raise what backward would have to raise, where the policy states an FP8 dgrad.

    Args:
        x: activations [..., K], whose gradient is recorded.
        weight: [N, K], any strides.

    Raises:
        BackendUnavailableError: as `explain` does.
    """
    if allowed.dgrad is not Dgrad.FP8:
        return
    if x.is_meta:
        transposed_recipe(recipe)
        return
    weight = unwrapped(weight)
    with torch._C._DisableFuncTorch():  # views made under torch.func.grad have no address
        explain(x.numel() // x.shape[-1], weight, recipe, x.dtype, allowed)


def grad_input(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    allowed: Policy,
) -> torch.Tensor:
    """dX [M, K] of dY [M, N] in `dtype`, rounded once.

    Args:
        grad: [M, N] bf16, fp16 or fp32, any strides. A NaN or infinity stays in its row.
        weight, weight_scale: [N, K] FP8 and the caller's multipliers to match.

    Raises:
        BackendUnavailableError: as `explain` does.
    """
    decision = explain(grad.shape[0], weight, recipe, dtype, allowed)
    fold, scale = _scales(weight_scale, recipe, *weight.shape)
    if fold is not None:
        grad = grad.float() * fold
    strides = registry.load(decision.backend).any_strides
    operand = weight.t() if strides else transposed(weight)
    return execute.forward(grad, operand, scale, None, None, _call(recipe, dtype, allowed))


def _call(recipe: Recipe, dtype: torch.dtype, allowed: Policy) -> LinearCall:
    return LinearCall(transposed_recipe(recipe), False, False, dtype, allowed, gradient=True)


def laid_out(problem: P, weight: torch.Tensor) -> P:
    """A product over the view of the transposed weight as it is once `transposed` has run."""
    if problem.weight_row_major:
        return problem
    n = weight.shape[-2]
    return replace(
        problem,
        weight_row_major=True,
        weight_contiguous=True,
        aligned=weight.is_meta or n % 16 == 0,
    )


def transposed(weight: torch.Tensor) -> torch.Tensor:
    """[..., K, N] with N contiguous, of a weight [..., N, K]: a copy, kept with it, if need be."""
    view = weight.transpose(-1, -2)
    if view.stride(-1) == 1 and view.stride(-2) >= weight.shape[-2]:
        return view

    def build() -> torch.Tensor:
        # As bytes: not every build of torch copies every FP8 dtype. A clone, since a view of one
        # row counts as contiguous, and the cache must not hold the weight's own memory.
        codes = view.detach().view(torch.uint8).clone(memory_format=torch.contiguous_format)
        return codes.view(weight.dtype)

    return prepared(weight, "dgrad", build)


def _scales(weight_scale: torch.Tensor, recipe: Recipe, n: int, k: int) -> _Scales:
    """The scales of the transposed weight, in memory of their own.

    Backends keep what they prepare with the scale that they are given. The forward pass gives them
    the caller's; another one here keeps the two apart.
    """
    scale = weight_scale_fp32(weight_scale, recipe, n, k)
    if recipe.granularity is Granularity.TENSOR:
        return _Scales(None, scale)
    if recipe.block_size is not None:
        key = "dgrad", recipe, n, k
        return _Scales(None, prepared(weight_scale, key, lambda: scale.t().contiguous()))
    largest = prepared(weight_scale, ("dgrad", "largest"), lambda: scale.max().reshape(1))
    # Not above 1, so that no finite dY overflows. A weight of zeros keeps its zeros.
    fold = prepared(
        weight_scale,
        ("dgrad", "fold"),
        lambda: torch.where(scale > 0, scale / largest, scale).reshape(1, n),
    )
    return _Scales(fold, largest)
