"""The names of the hub kernel ``finegrained-fp8``, versions 3 and 4, with their signatures.

Activations come raw and the output has their dtype unless `output_dtype` says otherwise. Scales
are fp32 or E8M0 (``float8_e8m0fnu`` or uint8); what they mean is said by `block_size` as in
version 1, except that E8M0 scales of groups of 32 columns are MXFP8 (`weights.version_4`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8dispatch.integrations.finegrained_fp8.weights import version_4
from fp8dispatch.linear import fp8_linear
from fp8dispatch.moe.activations import ExpertActivation
from fp8dispatch.moe.forward import BATCHED, GROUPED, Projection, experts_forward
from fp8dispatch.moe.matmul import fp8_experts_batched, fp8_experts_grouped

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def matmul_2d(
    A: torch.Tensor,
    B: torch.Tensor,
    Bs: torch.Tensor,
    block_size: Sequence[int] | None,
    output_dtype: torch.dtype | None = None,
    activation_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A @ B.T`` over an FP8 weight, [..., N].

    Args:
        A: [..., K] bfloat16, float16 or float32.
        B: [N, K] FP8, `Bs` its scales: one element, or [ceil(N / block_n), ceil(K / block_k)].
        block_size: [block_n, block_k]; None or [N, K] means one scale for the whole weight.
        output_dtype: bfloat16, float16 or float32; default is the dtype of A.
        activation_scale: one positive element: static activations, in every recipe.

    Raises:
        InvalidInputError: operands that do not fit together, packed FP4 weights among them.
    """
    scale, block = version_4(B, Bs, block_size)
    return fp8_linear(
        A,
        B,
        scale,
        block_size=block,
        activation_scale=activation_scale,
        out_dtype=output_dtype or A.dtype,
    )


def matmul_batched(
    A: torch.Tensor,
    B: torch.Tensor,
    Bs: torch.Tensor,
    expert_ids: torch.Tensor,
    block_size: Sequence[int] | None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Each row of A [S, K] times the weight of its expert in B [E, N, K], [S, N].

    Args:
        expert_ids: [S] integers of any width and stride; a row whose id is below 0 or from E on
            is zero.

    Raises:
        InvalidInputError: operands that do not fit together, packed FP4 weights among them.
    """
    scale, block = version_4(B, Bs, block_size)
    return fp8_experts_batched(
        A, B, scale, expert_ids, block_size=block, out_dtype=output_dtype or A.dtype
    )


def matmul_grouped(
    A: torch.Tensor,
    B: torch.Tensor,
    Bs: torch.Tensor,
    offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    block_size: Sequence[int] | None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rows of A [S, K] sorted by expert, each times the weight of its expert in B, [S, N].

    Args:
        offsets: [E] integers, inclusive cumulative ends of the experts' rows; rows behind the
            last one are zero.
        tokens_per_expert: not read, since `offsets` says the same.

    Raises:
        InvalidInputError: operands that do not fit together, packed FP4 weights among them.
    """
    scale, block = version_4(B, Bs, block_size)
    return fp8_experts_grouped(
        A, B, scale, offsets, block_size=block, out_dtype=output_dtype or A.dtype
    )


def moe_fused_batched(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_proj_scale_inv: torch.Tensor,
    down_proj_scale_inv: torch.Tensor,
    block_size: Sequence[int] | None,
    act_fn: str = "silu",
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    simulate_unfused: bool = False,
) -> torch.Tensor:
    """All of the gated experts in one call, rows in the order of the tokens: [T, H].

    Args:
        hidden_states: [T, H]; `top_k_index` and `top_k_weights`: [T, k].
        gate_up_proj: [E, 2 I, H] with the gate's rows first, `down_proj`: [E, H, I].
        act_fn: name of the activation of the gate.
        swiglu_alpha: gpt-oss's form, ``gate * sigmoid(alpha * gate) * (up + 1)``.
        swiglu_limit: clamps the gate from above and up on both sides.
        simulate_unfused: no effect: every step is rounded to the activations' dtype here.

    Raises:
        InvalidInputError: operands that do not fit together, packed FP4 weights among them.
    """
    return _fused(
        (hidden_states, top_k_index, top_k_weights),
        (gate_up_proj, gate_up_proj_scale_inv),
        (down_proj, down_proj_scale_inv),
        block_size,
        ExpertActivation(act_fn, limit=swiglu_limit, alpha=swiglu_alpha),
        BATCHED,
    )


def moe_fused_grouped(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_proj_scale_inv: torch.Tensor,
    down_proj_scale_inv: torch.Tensor,
    block_size: Sequence[int] | None,
    act_fn: str = "silu",
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    simulate_unfused: bool = False,
) -> torch.Tensor:
    """`moe_fused_batched` with the rows sorted by expert inside, for many tokens: [T, H]."""
    return _fused(
        (hidden_states, top_k_index, top_k_weights),
        (gate_up_proj, gate_up_proj_scale_inv),
        (down_proj, down_proj_scale_inv),
        block_size,
        ExpertActivation(act_fn, limit=swiglu_limit, alpha=swiglu_alpha),
        GROUPED,
    )


def _fused(
    routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gate_up: tuple[torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor],
    block_size: Sequence[int] | None,
    activation: ExpertActivation,
    route: str,
) -> torch.Tensor:
    projections = []
    for weight, scale in (gate_up, down):
        meant, block = version_4(weight, scale, block_size)
        projections.append(Projection(weight, meant, block_size=block))
    out = experts_forward(*routed, projections[:1], activation, projections[1], route=route)
    return out.to(routed[0].dtype)
