"""`fp8_experts_batched` and `fp8_experts_grouped`: rows times the FP8 weights of their experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.eager import BACKEND as EAGER
from fp8dispatch.checks import check_activations, check_device, check_out_dtype
from fp8dispatch.formats import activation_float8, dtype_name
from fp8dispatch.moe.routing import Routing, check_values, clamp_ends, sort_by_expert
from fp8dispatch.moe.validate import (
    ExpertOperands,
    check_expert_activation_scale,
    check_expert_bias,
    check_expert_operands,
    check_flag,
    check_index,
    check_rows,
)
from fp8dispatch.prepare import expert_activation_scale_fp32, expert_scale_fp32
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation


def fp8_experts_batched(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: Sequence[int] | None = None,
    activation_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Each row times the FP8 weight of its expert: ``x[t] @ dequantised(weight[ids[t]]).T``.

    Rows come in any order; those of one expert read its weights together. Nothing waits for the
    device.

    Args:
        x: [T, K] bfloat16, float16 or float32, T = 0 included, any strides.
        weight: [E, N, K] FP8, any strides.
        weight_scale: multipliers, ``value = data * scale``: [E] (per tensor), [E, N] (per row),
            [E, ceil(N / bn), ceil(K / bk)] (blocks) or [E, N, ceil(K / g)] (groups).
        expert_ids: [T] of any integer dtype and stride. An id below 0 or from E on (a row of
            another rank, or padding) gives a row of zeros.
        bias: [E, N], added once.
        block_size: (bn, bk) of a block scale; states what else is inferred as in `fp8_linear`.
        activation_scale: one positive element, or one for each expert: static activations.
        out_dtype: bfloat16, float16 or float32; default is the dtype of x.
        backend: run this backend or raise; None takes the first that fits.

    Returns:
        [T, N] in `out_dtype`.

    Raises:
        InvalidInputError: arguments that do not fit.
    """
    operands = _check(x, weight, weight_scale, bias, block_size, activation_scale, out_dtype)
    check_index("expert_ids", expert_ids, x.shape[0], "row of x", weight)
    routing = sort_by_expert(expert_ids, weight.shape[0])
    return _run(x, operands, bias, activation_scale, out_dtype, routing)


def fp8_experts_grouped(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: Sequence[int] | None = None,
    activation_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    gather: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
    backend: str | None = None,
    debug: bool = False,
) -> torch.Tensor:
    """Rows sorted by expert, each times the FP8 weight of its expert.

    Sorted row s takes row ``gather[s]`` of x and goes to row ``scatter[s]`` of the output, so that
    no sorted copy of the activations is needed. Nothing waits for the device, and what the call
    launches depends on shapes alone.

    Args:
        x: [S, K], or [T, K] with `gather`; bfloat16, float16 or float32, any strides.
        weight, weight_scale, bias, block_size, activation_scale, out_dtype, backend: as in
            `fp8_experts_batched`.
        offsets: [E] integers, the inclusive cumulative ends of the experts' rows:
            ``torch.cumsum(rows_per_expert, 0)``. Values are clamped to rise within 0 and S; rows
            behind the last end belong to no expert and give rows of zeros.
        gather: [S] integers, row of x of each sorted row. Out of range gives a row of zeros.
        scatter: [S] integers, row of the output of each sorted row, each at most once. Out of
            range is not written; rows that nothing is written to are zero.
        debug: read the values, which waits for the device, and raise on those that are clamped.

    Returns:
        [S, N] in `out_dtype`.

    Raises:
        InvalidInputError: arguments that do not fit; with `debug` also values.
    """
    operands = _check(x, weight, weight_scale, bias, block_size, activation_scale, out_dtype)
    check_flag("debug", debug)
    check_index("offsets", offsets, weight.shape[0], "expert", weight)
    rows = x.shape[0]
    if gather is not None:
        check_index("gather", gather, None, "sorted row", weight)
        rows = gather.shape[0]
    if scatter is not None:
        check_index("scatter", scatter, rows, "sorted row", weight)
    if debug:
        check_values(offsets, rows, gather, scatter, x.shape[0])
    routing = Routing(clamp_ends(offsets, rows), rows, gather, scatter, complete=scatter is None)
    return _run(x, operands, bias, activation_scale, out_dtype, routing)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    block_size: object,
    activation_scale: torch.Tensor | None,
    out_dtype: object,
) -> ExpertOperands:
    check_activations("x", x)
    check_rows("x", x)
    operands = check_expert_operands(weight, weight_scale, x.shape[-1], block_size)
    check_device("x", x, weight)
    check_expert_activation_scale(activation_scale, weight)
    check_expert_bias(bias, weight)
    check_out_dtype(out_dtype)
    return operands


def _run(
    x: torch.Tensor,
    operands: ExpertOperands,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    routing: Routing,
) -> torch.Tensor:
    weight, recipe = operands.weight, operands.recipe
    experts, n, k = weight.shape
    scale = expert_scale_fp32(operands.scale, recipe, experts, n, k)
    static = None
    if activation_scale is not None:
        static = expert_activation_scale_fp32(activation_scale, experts)
    dtype = activation_float8(weight.dtype)
    problem = LinearProblem(
        routing.rows,
        n,
        k,
        recipe,
        dtype_name(weight.dtype),
        dtype_name(dtype),
        dtype_name(out_dtype or x.dtype),
    )
    out = x.new_zeros((routing.rows, n), dtype=out_dtype or x.dtype)
    start = 0
    for expert, end in enumerate(routing.ends.tolist()):
        rows, start = torch.arange(start, end, device=x.device), end
        source = rows if routing.gather is None else routing.gather[rows].long()
        target = rows if routing.scatter is None else routing.scatter[rows].long()
        kept = (source >= 0) & (source < x.shape[0]) & (target >= 0) & (target < routing.rows)
        source, target = source[kept], target[kept]
        if not source.numel():
            continue
        one = None if static is None else static[expert : expert + 1]
        xq: QuantizedActivation = quantize_activation(
            x.detach()[source], recipe.group_size(k), dtype, one, use_kernels=False
        )
        one_weight = Weight(weight[expert], scale[expert], recipe, operands.scale)
        out[target] = EAGER.matmul(xq, one_weight, None if bias is None else bias[expert], problem)
    return out
