"""What a weight scale means: per tensor, per row, or per block; inferred from shapes or stated.

The rules, for a weight [N, K]:

| recipe | scale shape                       | activations, when dynamic          |
|--------|-----------------------------------|------------------------------------|
| tensor | one element                       | one scale per token                |
| row    | [N] or [N, 1]                     | one scale per token                |
| block  | [ceil(N / bn), ceil(K / bk)]      | one scale per token and bk columns |

A shape that fits several rules is accepted when all readings give the same numbers (a [1, 1]
scale over a weight no larger than a block, say) and refused with the readings named otherwise.
Nothing here imports torch: a recipe is plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from numbers import Integral

from fp8dispatch.errors import AmbiguousRecipeError, DTypeError, InvalidInputError, ShapeError

DEFAULT_BLOCK = (128, 128)
GROUP_SIZES = (32, 64, 128)
"""Group sizes that a scale [N, ceil(K / g)] is recognised by; any other one must be stated."""


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below ``a / b``, for a >= 0 and b > 0."""
    return -(-a // b)


def parse_block_size(block_size: object) -> tuple[int, int] | None:
    """A user's ``block_size`` as ``(block_n, block_k)``; None stays None.

    Raises:
        DTypeError: not a sequence of two integers.
        ShapeError: a size below 1.
    """
    if block_size is None:
        return None
    if (
        not isinstance(block_size, Sequence)
        or isinstance(block_size, (str, bytes))
        or len(block_size) != 2
        or any(not isinstance(size, Integral) or isinstance(size, bool) for size in block_size)
    ):
        raise DTypeError(
            f"block_size must be two integers (block_n, block_k) such as (128, 128), "
            f"found {block_size!r}"
        )
    block_n, block_k = (int(size) for size in block_size)
    if block_n < 1 or block_k < 1:
        raise ShapeError(f"block_size must be positive, found ({block_n}, {block_k})")
    return block_n, block_k


class Granularity(str, Enum):
    """Over what one weight scale stretches."""

    TENSOR = "tensor"
    ROW = "row"
    BLOCK = "block"


@dataclass(frozen=True)
class Recipe:
    """The meaning of a weight scale, and with it of the activations' scales.

    Attributes:
        granularity: tensor, row or block.
        block_size: ``(block_n, block_k)`` of a block recipe, else None.
    """

    granularity: Granularity
    block_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.granularity, Granularity):
            raise DTypeError(
                f"a Recipe needs a Granularity, found {self.granularity!r}; use "
                f"Recipe.parse for names"
            )
        # Frozen, but a list given as block_size must not leave the recipe unhashable.
        object.__setattr__(self, "block_size", parse_block_size(self.block_size))
        if (self.block_size is None) == (self.granularity is Granularity.BLOCK):
            raise InvalidInputError(
                f"a block recipe needs a block_size and the others take none, found "
                f"{self.granularity.value} with block_size={self.block_size}"
            )

    @classmethod
    def parse(cls, recipe: str | Recipe, block_size: object = None) -> Recipe:
        """A recipe from its name.

        Args:
            recipe: ``"tensor"``, ``"row"`` or ``"block"``, or a `Recipe`, which is returned.
            block_size: ``(block_n, block_k)`` of ``"block"``, default (128, 128).

        Raises:
            InvalidInputError: an unknown name, or a block size given to a recipe without blocks.
        """
        if isinstance(recipe, Recipe):
            if block_size is not None and parse_block_size(block_size) != recipe.block_size:
                raise InvalidInputError(
                    f"block_size={block_size} contradicts {recipe}; pass one of the two"
                )
            return recipe
        known = ", ".join(member.value for member in Granularity)
        if not isinstance(recipe, str) or recipe not in {member.value for member in Granularity}:
            raise InvalidInputError(f"recipe must be a Recipe or one of {known}, found {recipe!r}")
        granularity = Granularity(recipe)
        if granularity is Granularity.BLOCK:
            return cls(granularity, parse_block_size(block_size) or DEFAULT_BLOCK)
        if block_size is not None:
            raise InvalidInputError(
                f"only the block recipe takes a block_size, found block_size={block_size} "
                f"with recipe {recipe!r}"
            )
        return cls(granularity)

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the weight scale of an [n, k] weight: (1,), (n, 1) or the grid of blocks."""
        if self.block_size is not None:
            return ceil_div(n, self.block_size[0]), ceil_div(k, self.block_size[1])
        return (1,) if self.granularity is Granularity.TENSOR else (n, 1)

    def group_size(self, k: int) -> int:
        """Columns of a token that share one dynamic activation scale."""
        return self.block_size[1] if self.block_size is not None else max(k, 1)

    def __str__(self) -> str:
        if self.block_size is None:
            return self.granularity.value
        return f"block {self.block_size[0]}x{self.block_size[1]}"


TENSOR = Recipe(Granularity.TENSOR)
ROW = Recipe(Granularity.ROW)
BLOCK_128 = Recipe(Granularity.BLOCK, DEFAULT_BLOCK)


def stated_block_size(
    argument: object, weight_attribute: object, scale_attribute: object
) -> tuple[int, int] | None:
    """The block size that the call states: the argument, else the tensors' attributes.

    Raises:
        AmbiguousRecipeError: both tensors carry a ``block_size`` and they differ.
    """
    if argument is not None:
        return parse_block_size(argument)
    of_weight, of_scale = parse_block_size(weight_attribute), parse_block_size(scale_attribute)
    if of_weight is not None and of_scale is not None and of_weight != of_scale:
        raise AmbiguousRecipeError(
            f"weight.block_size is {of_weight} and weight_scale.block_size is {of_scale}; "
            f"pass block_size=(block_n, block_k) to say which one holds"
        )
    return of_weight or of_scale


def infer_recipe(
    weight_shape: tuple[int, int],
    scale_shape: tuple[int, ...],
    block_size: tuple[int, int] | None = None,
    names: tuple[str, str] = ("weight", "weight_scale"),
) -> Recipe:
    """The recipe that a scale shape means for a weight [N, K].

    Args:
        weight_shape: (N, K), both at least 1.
        scale_shape: shape of the weight scale.
        block_size: the stated block size; None means infer, with (128, 128) for a grid.
        names: what the caller's weight and scale are called, for the sentences.

    Raises:
        ShapeError: no rule gives this shape; the message lists what each rule would need.
    """
    n, k = weight_shape
    if block_size is not None:
        return _stated(n, k, scale_shape, block_size, names)
    if prod(scale_shape) == 1 and len(scale_shape) <= 2:
        # A grid or a column of one element gives the same numbers: K is then within one block.
        return TENSOR
    if scale_shape in ((n,), (n, 1)):
        return ROW
    if scale_shape == BLOCK_128.scale_shape(n, k):
        return BLOCK_128
    for group in GROUP_SIZES:
        recipe = Recipe(Granularity.BLOCK, (1, group))
        if scale_shape == recipe.scale_shape(n, k):
            return recipe
    raise ShapeError(_impossible(n, k, scale_shape, names))


def _stated(
    n: int,
    k: int,
    scale_shape: tuple[int, ...],
    block_size: tuple[int, int],
    names: tuple[str, str],
) -> Recipe:
    recipe = Recipe(Granularity.BLOCK, block_size)
    grid = recipe.scale_shape(n, k)
    if scale_shape == grid or (grid == (1, 1) and prod(scale_shape) == 1):
        if block_size[1] < k:
            return recipe
        if block_size[0] >= n:
            return TENSOR  # one block: the same numbers, and more backends take it
        return ROW if block_size[0] == 1 else recipe
    other = "per-tensor" if prod(scale_shape) == 1 else "per-row" if scale_shape[0] == n else None
    reading = (
        f", which reads as {other}; drop block_size (argument or attribute) if that is meant"
        if other
        else ""
    )
    raise ShapeError(
        f"block_size={block_size} on a {names[0]} [{n}, {k}] needs a {names[1]} {list(grid)}, "
        f"found {list(scale_shape)}{reading}"
    )


def _impossible(n: int, k: int, scale_shape: tuple[int, ...], names: tuple[str, str]) -> str:
    readings = [
        "[1] (per-tensor)",
        f"[{n}] or [{n}, 1] (per-row)",
        f"{list(BLOCK_128.scale_shape(n, k))} (blocks of 128x128)",
        f"{list(Recipe(Granularity.BLOCK, (1, 32)).scale_shape(n, k))} (groups of 32; 64 and 128 "
        f"alike)",
    ]
    hint = "pass block_size=(block_n, block_k) for other blocks"
    if len(scale_shape) == 2:
        flipped = (scale_shape[1], scale_shape[0])
        if flipped in ((n, 1), BLOCK_128.scale_shape(n, k)):
            hint = f"it fits when transposed: pass {names[1]}.t()"
    return (
        f"{names[1]} for a {names[0]} [{n}, {k}] must be {', '.join(readings)}, "
        f"found {list(scale_shape)}; {hint}"
    )
