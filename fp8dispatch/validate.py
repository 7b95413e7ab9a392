"""Checks the operands of a call against each other and says what they are.

With `checks`, which looks at one argument at a time, this is the border: nothing past it sees bad
input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8dispatch.checks import check_dense, check_device, check_dtype
from fp8dispatch.errors import AmbiguousRecipeError, DTypeError, ShapeError
from fp8dispatch.formats import FLOAT8_DTYPES, SCALE_DTYPES, activation_float8, dtype_name
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import Recipe, ceil_div, infer_recipe, stated_block_size


@dataclass(frozen=True)
class Operands:
    """A weight and its scale as [N, K], whichever way round they were passed.

    Attributes:
        weight: [N, K] FP8: the caller's tensor, or a transposed view of it.
        scale: the caller's scale, or a transposed view of it, undecoded.
        recipe: what the scale means.
        transposed: the caller passed [K, N].
    """

    weight: torch.Tensor
    scale: torch.Tensor
    recipe: Recipe
    transposed: bool


def check_operands(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    k: int | None,
    block_size: object,
    names: tuple[str, str] = ("weight", "weight_scale"),
) -> Operands:
    """A checked weight and scale for activations of K columns.

    Args:
        k: columns of the activations; None takes the weight as [N, K] as it is.
        block_size: the caller's argument.
        names: what the caller's arguments are called, for the sentences.

    Raises:
        DTypeError, ShapeError, AmbiguousRecipeError, DeviceError: what is wrong, in a sentence.
    """
    name, scale_name = names
    check_dense(name, weight)
    check_dense(scale_name, weight_scale)
    is_bytes = weight.dtype in (torch.uint8, torch.int8)
    remedy = (
        f"say which format the bytes are: {name}.view(torch.float8_e4m3fn)"
        if is_bytes
        else "quantise it with fp8dispatch.quantize"
    )
    check_dtype(name, weight, FLOAT8_DTYPES, remedy)
    remedy = f"convert it with {scale_name}.to(torch.float32)"
    check_dtype(scale_name, weight_scale, SCALE_DTYPES, remedy)
    if weight.dim() != 2:
        raise ShapeError(
            f"{name} must be a matrix [N, K], found shape {list(weight.shape)}; experts are taken "
            f"one at a time"
        )
    if weight.numel() == 0:
        raise ShapeError(f"{name} must not be empty, found shape {list(weight.shape)}")
    if weight_scale.dim() > 2:
        raise ShapeError(
            f"{scale_name} must have at most 2 dimensions, found shape {list(weight_scale.shape)}"
        )
    check_device(scale_name, weight_scale, weight)
    block = stated_block_size(
        block_size,
        getattr(weight, "block_size", None),
        getattr(weight_scale, "block_size", None),
    )
    rows, columns = weight.shape
    scale_shape = tuple(weight_scale.shape)
    if k is None or columns == k:
        recipe = infer_recipe((rows, columns), scale_shape, block, names)
        return Operands(weight, weight_scale, recipe, transposed=False)
    if rows != k:
        raise ShapeError(
            f"X has K={k} columns and needs a {name} [N, {k}] (or its transposed view [{k}, N]), "
            f"found {list(weight.shape)}"
        )
    recipe, flipped = _transposed_recipe((columns, rows), scale_shape, block)
    scale = weight_scale.t() if flipped else weight_scale
    return Operands(weight.t(), scale, recipe, transposed=True)


def _transposed_recipe(
    weight_shape: tuple[int, int], scale_shape: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[Recipe, bool]:
    """The recipe of a weight passed as [K, N], and whether its scale is transposed as well."""
    if len(scale_shape) < 2 or scale_shape == (1, 1):
        return infer_recipe(weight_shape, scale_shape, block), False
    readings: list[tuple[Recipe, bool]] = []
    for flipped, shape in ((True, scale_shape[::-1]), (False, scale_shape)):  # Dynamo reads this
        recipe = _try_infer(weight_shape, shape, block)
        if recipe is not None:
            readings.append((recipe, flipped))
    if len(readings) == 2:
        n, k = weight_shape
        raise AmbiguousRecipeError(
            f"weight [{k}, {n}] is transposed and weight_scale {list(scale_shape)} fits both "
            f"transposed ({readings[0][0]}) and as it is ({readings[1][0]}); pass the weight as "
            f"[N, K]"
        )
    if not readings:
        return infer_recipe(weight_shape, scale_shape[::-1], block), True  # raises the sentence
    return readings[0]


def _try_infer(
    weight_shape: tuple[int, int], scale_shape: tuple[int, ...], block: tuple[int, int] | None
) -> Recipe | None:
    try:
        return infer_recipe(weight_shape, scale_shape, block)
    except ShapeError:
        return None


def check_quantized(x: QuantizedActivation, operands: Operands) -> QuantizedActivation:
    """Quantised activations as matrices that fit the weight's recipe and format.

    Raises:
        DTypeError, ShapeError, DeviceError: what is wrong, in a sentence.
    """
    expected = activation_float8(operands.weight.dtype)
    if x.data.dtype != expected:
        raise DTypeError(
            f"activations beside a {dtype_name(operands.weight.dtype)} weight must be "
            f"{dtype_name(expected)}, found {dtype_name(x.data.dtype)}; quantise with "
            f"dtype=torch.{dtype_name(expected)}"
        )
    check_device("X.scale", x.scale, x.data)
    k = x.data.shape[-1]
    group = operands.recipe.group_size(k)
    matrix = x.matrix()
    expected_shape = (matrix.data.shape[0], ceil_div(k, group))
    leading = x.scale.dim() <= 2 or x.scale.shape[:-1] == x.data.shape[:-1]
    if x.scale.numel() != 1 and (matrix.scale.shape != expected_shape or not leading):
        remedy = f"with group_size={group}" if operands.recipe.block_size else "without group_size"
        raise ShapeError(
            f"a {operands.recipe} weight with K={k} needs activation scales "
            f"{list(expected_shape)} or one element, found {list(x.scale.shape)}; quantise {remedy}"
        )
    return matrix
