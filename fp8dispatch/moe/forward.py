"""The forward pass of routed experts: two matmuls, the activation between them, a weighted sum.

    Y[t] = sum over j of  w[t, j] * down(act(up(X[t], e), e)),  e = ids[t, j]

Tokens go through it in one of two ways with the same numbers up to the order of sums inside a
matmul: *batched* leaves the rows in the order of the tokens, *grouped* reads and writes them
sorted by expert. Nothing waits for the device, and what is launched depends on shapes alone, so
that a captured graph stays right when the routing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from fp8dispatch.checks import (
    check_activations,
    check_dense,
    check_device,
    check_dtype,
    check_size,
)
from fp8dispatch.errors import AmbiguousRecipeError, InvalidInputError, ShapeError
from fp8dispatch.execute import autocast_dtype
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.moe.combine import combine
from fp8dispatch.moe.matmul import explain_experts, fp8_experts_batched, fp8_experts_grouped
from fp8dispatch.moe.routing import sort_by_expert
from fp8dispatch.moe.validate import check_index
from fp8dispatch.oplibrary import without_autocast
from fp8dispatch.quantization.weight import block_of
from fp8dispatch.recipe import Recipe, infer_recipe, parse_block_size
from fp8dispatch.router import Decision

GROUPED_FROM = 0.5
"""Rows per expert, on average, from which the grouped way is taken: where the two cross, on the
device's clock, at 0.25 to 0.5 in three models (bench/results/h200-experts_layer.json)."""

BATCHED, GROUPED = "batched", "grouped"


@dataclass(frozen=True)
class Projection:
    """One matmul of all experts.

    Attributes:
        weight: [E, N, K] FP8.
        scale: multipliers, as `fp8_experts_grouped` takes them.
        bias: [E, N] or None.
        activation_scale: one element or [E], or None for scales computed per token.
        block_size: (bn, bk) of a block scale, or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None
    activation_scale: torch.Tensor | None = None
    block_size: Sequence[int] | None = None

    def halves(self) -> tuple[Projection, Projection]:
        """The gate and the up half of a fused projection whose halves have a scale each; views."""
        weights, scales = self.weight.chunk(2, dim=1), self.scale.chunk(2, dim=1)
        biases = (None, None) if self.bias is None else self.bias.chunk(2, dim=1)
        gate, up = (
            Projection(weight, scale, bias, self.activation_scale, self.block_size)
            for weight, scale, bias in zip(weights, scales, biases, strict=True)
        )
        return gate, up


def way(rows: int, experts: int) -> str:
    """``"batched"`` or ``"grouped"`` for this many uses of an expert."""
    return GROUPED if rows >= GROUPED_FROM * experts else BATCHED


def has_halves(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block_size: Sequence[int] | None,
    stated: bool | None = None,
) -> bool:
    """Whether gate and up of a fused weight [E, 2 I, K] were quantised apart, each by its grid.

    Checkpoints that hold gate and up apart are fused by placing the grids of their scales side by
    side. Where I is no multiple of the block's rows, that is another partition than the grid of
    the fused weight, and another meaning of the same tensor where both have as many rows.

    Args:
        stated: what the caller knows; None means infer.

    Raises:
        AmbiguousRecipeError: both readings fit, with different numbers, and nothing is stated.
    """
    rows, columns = weight.shape[1:]
    if scale.dim() != 3 or rows % 2 or scale.shape[1] % 2:
        return False
    half, block = rows // 2, parse_block_size(block_size)
    whole = _fits(rows, columns, tuple(scale.shape[1:]), block)
    apart = _fits(half, columns, (scale.shape[1] // 2, scale.shape[2]), block)
    if whole is None or apart is None:
        return whole is None and apart is not None
    height, _ = block_of(whole, rows, columns)
    half_height, _ = block_of(apart, half, columns)
    if height == half_height and half % height == 0:
        return False  # the same partition
    if stated is None:
        raise AmbiguousRecipeError(
            f"a gate_up scale {list(scale.shape)} over a weight {list(weight.shape)} fits the "
            f"fused weight ({whole}) and also gate and up by themselves ({apart}), with other "
            f"numbers; state split_scales=True where the two were quantised apart, else False"
        )
    return stated


def _fits(
    rows: int, columns: int, scale_shape: tuple[int, ...], block: tuple[int, int] | None
) -> Recipe | None:
    try:
        return infer_recipe((rows, columns), scale_shape, block)
    except ShapeError:
        return None


def experts_forward(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    up: Sequence[Projection],
    activation: Callable[..., torch.Tensor],
    down: Projection,
    *,
    route: str | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The weighted sum of the experts' outputs of each token.

    Args:
        x: [..., H] bfloat16, float16 or float32.
        expert_ids: [..., k] or [T, k] of any integer dtype, T tokens in all. An id below 0 or from
            E on adds nothing to its token and takes no gradient, whatever its weight.
        expert_weights: like `expert_ids`, in a float dtype; they get a gradient.
        up: one projection (fused or not gated) or two (gate, up).
        activation: called with the outputs of `up`, [T k, N] each; gives [T k, I].
        down: the projection [E, H, I] back.
        route: "batched" or "grouped"; None chooses by `way`.
        backend: run the matmuls on this backend or raise.

    Returns:
        [..., H] in autocast's dtype under autocast, else in that of `x`. Sums of the experts'
        outputs run in fp32.

    Raises:
        InvalidInputError: arguments that do not fit, also as `fp8_experts_grouped` raises it.
    """
    check_activations("x", x)
    tokens = x.numel() // x.shape[-1]
    top_k = _check_routing(expert_ids, expert_weights, tokens, up[0].weight)
    experts = up[0].weight.shape[0]
    ids = expert_ids.reshape(-1)
    weights = expert_weights.reshape(tokens, top_k)
    if route not in (None, BATCHED, GROUPED):
        raise InvalidInputError(f"route must be 'batched', 'grouped' or None, found {route!r}")
    chosen = route or way(tokens * top_k, experts)
    dtype = autocast_dtype(x) or x.dtype
    run = _batched if chosen == BATCHED else _grouped
    with without_autocast(x):
        out = run(x.reshape(tokens, x.shape[-1]), ids, top_k, up, activation, down, dtype, backend)
        out = combine(out, ids, weights, experts, dtype)
    return out.view(*x.shape[:-1], out.shape[-1])


def explain_forward(
    x: torch.Tensor,
    top_k: int,
    up: Sequence[Projection],
    down: Projection,
    *,
    backend: str | None = None,
    dgrad: bool | None = None,
) -> tuple[Decision, ...]:
    """Which backend each matmul of `experts_forward` would run, and why not the others.

    Args:
        x: [..., H], whose values are not read.
        top_k: experts of each token.
        dgrad: also say how gradients reach the inputs; None does so where `x` records one.

    Returns:
        One decision for each projection of `up`, and one for `down`.

    Raises:
        InvalidInputError, BackendUnavailableError: as the forward pass.
    """
    check_activations("x", x)
    check_size("top_k", top_k)
    tokens, dtype = x.numel() // x.shape[-1], autocast_dtype(x) or x.dtype
    uses = tokens * top_k
    batched = way(uses, down.weight.shape[0]) == BATCHED
    inner = torch.empty((uses, down.weight.shape[-1]), dtype=dtype, device=x.device)

    def explain(rows: torch.Tensor, by: Projection, **places: bool) -> Decision:
        return explain_experts(
            rows,
            by.weight,
            by.scale,
            by.bias,
            batched=batched,
            rows=uses,
            block_size=by.block_size,
            activation_scale=by.activation_scale,
            out_dtype=dtype,
            backend=backend,
            dgrad=x.requires_grad and torch.is_grad_enabled() if dgrad is None else dgrad,
            **places,
        )

    flat = x.reshape(tokens, x.shape[-1])
    into = tuple(explain(flat, one, gathers=True) for one in up)
    return (*into, explain(inner, down, scatters=not batched))


def _batched(
    x: torch.Tensor,
    ids: torch.Tensor,
    top_k: int,
    up: Sequence[Projection],
    activation: Callable[..., torch.Tensor],
    down: Projection,
    dtype: torch.dtype,
    backend: str | None,
) -> torch.Tensor:
    """Rows in the order of the tokens: [T k, H]."""

    def project(
        rows: torch.Tensor, by: Projection, gather: torch.Tensor | None = None
    ) -> torch.Tensor:
        return fp8_experts_batched(
            rows,
            by.weight,
            by.scale,
            ids,
            by.bias,
            block_size=by.block_size,
            activation_scale=by.activation_scale,
            out_dtype=dtype,
            gather=gather,
            backend=backend,
        )

    token = torch.arange(ids.shape[0], device=ids.device) // max(top_k, 1)
    return project(activation(*[project(x, one, gather=token) for one in up]), down)


def _grouped(
    x: torch.Tensor,
    ids: torch.Tensor,
    top_k: int,
    up: Sequence[Projection],
    activation: Callable[..., torch.Tensor],
    down: Projection,
    dtype: torch.dtype,
    backend: str | None,
) -> torch.Tensor:
    """Rows sorted by expert inside, without a sorted copy of `x`: [T k, H]."""
    routing = sort_by_expert(ids, down.weight.shape[0])
    order = routing.scatter

    def project(
        rows: torch.Tensor,
        by: Projection,
        gather: torch.Tensor | None = None,
        scatter: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return fp8_experts_grouped(
            rows,
            by.weight,
            by.scale,
            routing.ends,
            by.bias,
            block_size=by.block_size,
            activation_scale=by.activation_scale,
            out_dtype=dtype,
            gather=gather,
            scatter=scatter,
            backend=backend,
        )

    assert order is not None  # sorting gives one
    token = order // max(top_k, 1)
    inner = activation(*[project(x, one, gather=token) for one in up])
    return project(inner, down, scatter=order)


def _check_routing(
    expert_ids: torch.Tensor, expert_weights: torch.Tensor, tokens: int, weight: torch.Tensor
) -> int:
    """Experts per token of a checked pair of ids and weights.

    Raises:
        DTypeError, ShapeError, DeviceError: what is wrong, in a sentence.
    """
    check_dense("expert_ids", expert_ids)
    check_dense("expert_weights", expert_weights)
    remedy = "convert them with expert_weights.float()"
    check_dtype("expert_weights", expert_weights, ACTIVATION_DTYPES, remedy)
    check_device("expert_weights", expert_weights, weight)
    if expert_ids.dim() < 2 or prod(expert_ids.shape[:-1]) != tokens:
        raise ShapeError(
            f"expert_ids must be [{tokens}, k], the k experts of each token, found "
            f"{list(expert_ids.shape)}"
        )
    if expert_weights.shape != expert_ids.shape:
        raise ShapeError(
            f"expert_weights must be {list(expert_ids.shape)} as expert_ids are, found "
            f"{list(expert_weights.shape)}"
        )
    top_k = expert_ids.shape[-1]
    check_index("expert_ids", expert_ids.reshape(-1), tokens * top_k, "use of an expert", weight)
    return int(top_k)
