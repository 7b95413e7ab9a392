"""FP8 dgrad of expert matmuls: dX as an expert matmul over dY, where ``dgrad="fp8"`` is stated.

Each row of dY is multiplied with the transposed weight of its expert, by the backends that multiply
forward: the way of `fp8dispatch.dgrad`, with its table of recipes. Rows that X gives to several
experts are then summed in fp32. The transposed bytes of all experts are kept with their weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fp8dispatch import dgrad, registry
from fp8dispatch.checks import unwrapped
from fp8dispatch.decide import decide
from fp8dispatch.moe import execute, gradient
from fp8dispatch.moe.execute import ExpertsCall
from fp8dispatch.moe.routing import Routing, clamped_ends
from fp8dispatch.policy import Policy
from fp8dispatch.prepare import expert_scale_fp32, prepared
from fp8dispatch.problem import Dgrad
from fp8dispatch.recipe import Granularity, Recipe
from fp8dispatch.router import Decision


def explain(
    routing: Routing, weight: torch.Tensor, recipe: Recipe, dtype: torch.dtype, allowed: Policy
) -> Decision:
    """Which backend computes dX; asked before the forward pass runs, so that a refusal comes then.

    Args:
        routing: of the forward call.
        weight: [E, N, K], any strides.
        recipe: what the scale of each expert means.
        dtype: of dX.
        allowed: the policy of the forward call.

    Raises:
        BackendUnavailableError: the recipe has no FP8 dgrad, or every allowed backend refused.
    """
    call = _call(routing, recipe, dtype, allowed)
    view = weight.transpose(1, 2)
    problem = execute.describe_call(_backwards(routing), view, call, None, None)
    return decide(dgrad.laid_out(problem, weight), weight.device, allowed)


def admit(
    x: torch.Tensor, weight: torch.Tensor, routing: Routing, recipe: Recipe, allowed: Policy
) -> None:
    """Raise what backward would have to raise, where the policy states an FP8 dgrad.

    Raises:
        BackendUnavailableError: as `explain` does.
    """
    if allowed.dgrad is not Dgrad.FP8:
        return
    if x.is_meta:
        _call(routing, recipe, x.dtype, allowed)
        return
    weight = unwrapped(weight)
    with torch._C._DisableFuncTorch():  # views made under torch.func.grad have no address
        explain(routing, weight, recipe, x.dtype, allowed)


def grad_input(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    routing: Routing,
    recipe: Recipe,
    dtype: torch.dtype,
    allowed: Policy,
) -> torch.Tensor:
    """dX [T, K] in `dtype` of dY [rows, N]; a row of X sums over its uses in fp32.

    Args:
        weight, weight_scale: [E, N, K] FP8 and the caller's multipliers.
        routing: of the forward call.

    Raises:
        BackendUnavailableError: as `explain` does.
    """
    decision = explain(routing, weight, recipe, dtype, allowed)
    share, scale = _scales(weight_scale, recipe, weight.shape)
    back = _backwards(routing)
    if share is not None:
        grad, back = _folded(grad, share, back)
    strides = registry.load_experts(decision.backend).any_strides
    operand = weight.transpose(1, 2) if strides else dgrad.transposed(weight)
    index = back.expert_ids if back.offsets is None else back.offsets
    assert index is not None  # one of the two is there
    rows = execute.forward(
        grad, operand, scale, index, None, None, back.gather, None,
        _call(routing, recipe, dtype, allowed),
    )  # fmt: skip
    if routing.gather is None:
        return rows
    return gradient.sum_uses(rows, routing.gather, routing.inputs)


def _call(routing: Routing, recipe: Recipe, dtype: torch.dtype, allowed: Policy) -> ExpertsCall:
    turned = dgrad.transposed_recipe(recipe)
    return ExpertsCall(turned, dtype, allowed, routing.expert_ids is not None, gradient=True)


def _backwards(routing: Routing) -> Routing:
    """The same rows with dY for X: read where they were written, and left in their own order."""
    return Routing(
        routing.experts,
        routing.rows,
        routing.rows,
        routing.expert_ids,
        routing.offsets,
        gather=routing.scatter,
    )


def _scales(
    weight_scale: torch.Tensor, recipe: Recipe, shape: torch.Size
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What dY is multiplied with, [E, N] or None, and the scales of the transposed weights.

    As in `fp8dispatch.dgrad`: a row's share of its expert's largest scale, and scales in memory of
    their own.
    """
    experts, n, _ = shape
    scale = expert_scale_fp32(weight_scale, recipe, *shape)
    if recipe.block_size is not None:
        key = "dgrad", recipe, shape
        return None, prepared(weight_scale, key, lambda: scale.transpose(1, 2).contiguous())
    if recipe.granularity is Granularity.TENSOR:
        return None, scale
    rows = scale.view(experts, n)
    largest = prepared(weight_scale, ("dgrad", "most"), lambda: rows.amax(1, keepdim=True))
    share = prepared(
        weight_scale,
        ("dgrad", "share"),
        lambda: torch.where(rows > 0, rows / largest, rows),
    )
    return share, largest


def _folded(grad: torch.Tensor, share: torch.Tensor, back: Routing) -> tuple[torch.Tensor, Routing]:
    """Rows of dY in the order of the product, each times the scales of its expert, in fp32."""
    places = torch.arange(back.rows, device=grad.device)
    last = share.shape[0] - 1
    if back.expert_ids is not None:
        owners = back.expert_ids.long().clamp(0, last)  # rows of no expert are never read
        return grad.float() * share[owners], back
    ends = clamped_ends(back.sort(use_kernels=False))
    owners = torch.searchsorted(ends, places, right=True).clamp(max=last)
    if back.gather is None:
        return grad.float() * share[owners], back
    source = back.gather.long()
    arrives = (source >= 0) & (source < back.inputs)
    rows = grad[source.clamp(0, back.inputs - 1)].float() * share[owners]
    return rows, replace(back, gather=torch.where(arrives, places, -1))
