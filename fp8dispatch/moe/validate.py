"""Checks of the arguments of expert matmuls; nothing behind them sees bad input.

Shapes, dtypes and devices are checked here, on the host. The *values* of ids, offsets and indices
lie on the device and are not read: whoever uses them clamps them there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8dispatch.checks import check_activations, check_dense, check_device, check_dtype
from fp8dispatch.errors import DTypeError, ShapeError
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, SCALE_DTYPES
from fp8dispatch.recipe import BLOCK_128, Recipe, ceil_div, infer_recipe, stated_block_size

INDEX_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)

MOST_ROWS = 2**31 - 2**20
"""Rows that kernels number in 32 bits, with room for the padding of tiles."""


@dataclass(frozen=True)
class ExpertOperands:
    """The weights of all experts and what their scale means.

    Attributes:
        weight: [E, N, K] FP8, any strides.
        scale: the caller's scale, undecoded.
        recipe: what the scale of each single expert means.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    recipe: Recipe


def check_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    gather: torch.Tensor | None,
    scatter: torch.Tensor | None,
    *,
    block_size: object,
    batched: bool,
) -> ExpertOperands:
    """Check the tensors of an expert matmul against each other.

    Args:
        index: the expert ids of a batched call, the offsets of a grouped one.

    Raises:
        DTypeError, ShapeError, AmbiguousRecipeError, DeviceError: what is wrong, in a sentence.
    """
    check_activations("x", x)
    check_rows("x", x)
    operands = check_expert_operands(weight, weight_scale, x.shape[-1], block_size)
    check_device("x", x, weight)
    check_expert_activation_scale(activation_scale, weight)
    check_expert_bias(bias, weight)
    rows = x.shape[0]
    if gather is not None:
        check_index("gather", gather, None, "row of the output", weight)
        rows = gather.shape[0]
    if rows > MOST_ROWS:
        raise ShapeError(
            f"an expert matmul takes at most {MOST_ROWS} rows (32-bit row numbers), found {rows}; "
            f"split the rows"
        )
    if batched:
        check_index("expert_ids", index, rows, "row of the output", weight)
    else:
        check_index("offsets", index, weight.shape[0], "expert", weight)
    if scatter is not None:
        check_index("scatter", scatter, rows, "sorted row", weight)
    return operands


def check_expert_operands(
    weight: torch.Tensor, weight_scale: torch.Tensor, k: int, block_size: object
) -> ExpertOperands:
    """Checked weights and scales of experts, for activations of K columns.

    Raises:
        DTypeError, ShapeError, AmbiguousRecipeError, DeviceError: what is wrong, in a sentence.
    """
    check_dense("weight", weight)
    check_dense("weight_scale", weight_scale)
    remedy = "quantise each expert with fp8dispatch.quantize"
    if weight.dtype in (torch.uint8, torch.int8):
        remedy = "say which format the bytes are: weight.view(torch.float8_e4m3fn)"
    check_dtype("weight", weight, FLOAT8_DTYPES, remedy)
    remedy = "convert it with weight_scale.to(torch.float32)"
    check_dtype("weight_scale", weight_scale, SCALE_DTYPES, remedy)
    if weight.dim() != 3 or weight.numel() == 0:
        raise ShapeError(
            f"weight must be [E, N, K] with at least one expert, row and column, found shape "
            f"{list(weight.shape)}; stack the experts with torch.stack"
        )
    experts, n, columns = weight.shape
    if columns != k:
        hint = "; pass weight.transpose(1, 2)" if n == k else "; give x the weight's columns"
        raise ShapeError(
            f"x has K={k} columns and needs a weight [E, N, {k}], found {list(weight.shape)}{hint}"
        )
    check_device("weight_scale", weight_scale, weight)
    block = stated_block_size(
        block_size,
        getattr(weight, "block_size", None),
        getattr(weight_scale, "block_size", None),
    )
    recipe = _expert_recipe((experts, n, k), tuple(weight_scale.shape), block)
    return ExpertOperands(weight, weight_scale, recipe)


def _expert_recipe(
    weight_shape: tuple[int, int, int],
    scale_shape: tuple[int, ...],
    block: tuple[int, int] | None,
) -> Recipe:
    """What the scale of each expert means; the rules of `recipe` behind a leading E."""
    experts, n, k = weight_shape
    if 1 <= len(scale_shape) <= 3 and scale_shape[0] == experts:
        try:
            return infer_recipe((n, k), scale_shape[1:] or (1,), block)
        except ShapeError:
            pass  # its sentence speaks of one expert; the one below speaks of the argument
    if block is not None:
        grid = [experts, *Recipe.parse("block", block).scale_shape(n, k)]
        raise ShapeError(
            f"block_size={block} on a weight [{experts}, {n}, {k}] needs a weight_scale {grid}, "
            f"found {list(scale_shape)}; drop block_size where the scale is not of blocks"
        )
    raise ShapeError(
        f"weight_scale for a weight [{experts}, {n}, {k}] must be [{experts}] (per-tensor), "
        f"[{experts}, {n}] (per-row), {[experts, *BLOCK_128.scale_shape(n, k)]} (blocks of "
        f"128x128) or [{experts}, {n}, {ceil_div(k, 32)}] (groups of 32; 64 and 128 alike), found "
        f"{list(scale_shape)}; pass block_size=(block_n, block_k) for other blocks"
    )


def check_rows(name: str, x: torch.Tensor) -> None:
    """Activations as one matrix, which may have no rows.

    Raises:
        ShapeError: another number of dimensions.
    """
    if x.dim() != 2:
        raise ShapeError(
            f"{name} must be a matrix [rows, K], one row for each use of an expert, found shape "
            f"{list(x.shape)}; reshape it with {name}.reshape(-1, {name}.shape[-1])"
        )


def check_index(
    name: str, index: torch.Tensor, length: int | None, of: str, weight: torch.Tensor
) -> None:
    """A vector of integers of any width and stride on the weight's device.

    Args:
        length: what it must have; None leaves it open.
        of: what each element belongs to, for the sentence.

    Raises:
        DTypeError, ShapeError, DeviceError: what is wrong.
    """
    check_dense(name, index)
    check_dtype(name, index, INDEX_DTYPES, f"convert it with {name}.to(torch.int32)")
    if index.dim() != 1 or (length is not None and index.shape[0] != length):
        wanted = "rows" if length is None else length
        raise ShapeError(
            f"{name} must be [{wanted}], one value for each {of}, found {list(index.shape)}"
        )
    check_device(name, index, weight)


def check_expert_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> None:
    """A bias [E, N] of a float dtype on the weight's device, or None.

    Raises:
        DTypeError, ShapeError, DeviceError: what is wrong.
    """
    if bias is None:
        return
    check_dense("bias", bias)
    check_dtype("bias", bias, ACTIVATION_DTYPES, "convert it with bias.to(torch.float32)")
    if bias.shape != weight.shape[:2]:
        raise ShapeError(
            f"bias must be {list(weight.shape[:2])}, one row for each expert, found "
            f"{list(bias.shape)}"
        )
    check_device("bias", bias, weight)


def check_expert_activation_scale(scale: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Static activation scales: one for all experts or one for each, on the weight's device.

    Raises:
        DTypeError, ShapeError, DeviceError: what is wrong.
    """
    if scale is None:
        return
    name = "activation_scale"
    check_dense(name, scale)
    check_dtype(name, scale, SCALE_DTYPES, f"convert it with {name}.to(torch.float32)")
    experts = weight.shape[0]
    if scale.numel() not in (1, experts):
        raise ShapeError(
            f"{name} must have one element, or one for each of {experts} experts, found "
            f"{list(scale.shape)}; leave it out for scales computed per token"
        )
    check_device(name, scale, weight)


def check_flag(name: str, value: object) -> None:
    """A bool.

    Raises:
        DTypeError: anything else.
    """
    if not isinstance(value, bool):
        raise DTypeError(f"{name} must be True or False, found {value!r}")
