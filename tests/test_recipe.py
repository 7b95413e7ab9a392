"""What a scale means: inferred from shapes or stated, and never guessed where it matters."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fp8dispatch import dequantize
from fp8dispatch.errors import AmbiguousRecipeError, DTypeError, InvalidInputError, ShapeError
from fp8dispatch.quantization.weight import dequantize_strip
from fp8dispatch.recipe import (
    BLOCK_128,
    GROUP_SIZES,
    ROW,
    TENSOR,
    Granularity,
    Recipe,
    ceil_div,
    infer_recipe,
    parse_block_size,
    stated_block_size,
)

# The GPU machine keeps its own packages, and may lack this one.
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
given = hypothesis.given

SIZES = st.integers(1, 300)
EDGES = st.sampled_from([1, 2, 16, 31, 32, 33, 64, 96, 127, 128, 129, 255, 256, 257])
DIMENSIONS = st.one_of(SIZES, EDGES)
BLOCKS = st.tuples(
    st.sampled_from([1, 2, 16, 64, 128, 200, 512]), st.sampled_from([1, 32, 48, 64, 128, 512])
)
RECIPES = st.one_of(st.sampled_from([TENSOR, ROW, BLOCK_128]), BLOCKS.map(lambda b: block(*b)))


def block(rows: int, columns: int) -> Recipe:
    return Recipe(Granularity.BLOCK, (rows, columns))


def spread(recipe: Recipe, n: int, k: int, scale: torch.Tensor) -> torch.Tensor:
    """The multiplier of every element [N, K]: what a recipe means, written from its definition."""
    rows, columns = recipe.block_size or {TENSOR: (n, k), ROW: (1, k)}[recipe]
    grid = scale.reshape(ceil_div(n, rows), ceil_div(k, columns))
    return grid[torch.arange(n) // rows][:, torch.arange(k) // columns]


def distinct(shape: tuple[int, ...]) -> torch.Tensor:
    """A scale whose values all differ, so that two readings that differ give other numbers."""
    size = int(torch.tensor(shape).prod())
    return (torch.arange(size, dtype=torch.float32) + 1).reshape(shape)


def admissible(n: int, k: int, shape: tuple[int, ...]) -> list[Recipe]:
    """Every recipe that the documented rules allow a scale of this shape to mean."""
    known = [TENSOR, ROW, BLOCK_128, *(block(1, group) for group in GROUP_SIZES)]
    readings = [recipe for recipe in known if recipe.scale_shape(n, k) == shape]
    if shape == (n,) and ROW not in readings:
        readings.append(ROW)
    if shape in ((), (1,), (1, 1)) and TENSOR not in readings:
        readings.append(TENSOR)
    return readings


@pytest.mark.parametrize(
    ("weight", "scale", "expected"),
    [
        ((256, 384), (), TENSOR),
        ((256, 384), (1,), TENSOR),
        ((256, 384), (1, 1), TENSOR),
        ((256, 384), (256,), ROW),
        ((256, 384), (256, 1), ROW),
        ((256, 384), (2, 3), BLOCK_128),
        ((130, 257), (2, 3), BLOCK_128),
        ((256, 384), (256, 12), block(1, 32)),
        ((256, 384), (256, 6), block(1, 64)),
        ((256, 384), (256, 3), block(1, 128)),
        ((256, 100), (256, 2), block(1, 64)),
        ((256, 100), (2, 1), BLOCK_128),
        ((100, 384), (1, 3), BLOCK_128),
        # Where every reading gives the same numbers the simplest one is taken.
        ((100, 100), (1, 1), TENSOR),
        ((1, 384), (1,), TENSOR),
        ((1, 384), (1, 3), BLOCK_128),
        ((256, 20), (256, 1), ROW),
        ((1, 1), (), TENSOR),
    ],
)
def test_recipe_is_inferred_from_the_scale(
    weight: tuple[int, int], scale: tuple[int, ...], expected: Recipe
) -> None:
    assert infer_recipe(weight, scale) == expected


@pytest.mark.parametrize(
    ("weight", "scale", "stated", "expected"),
    [
        ((256, 384), (2, 3), (128, 128), BLOCK_128),
        ((256, 384), (4, 6), (64, 64), block(64, 64)),
        ((256, 384), (4, 2), (64, 192), block(64, 192)),
        ((256, 384), (256, 3), (1, 128), block(1, 128)),
        ((256, 384), (256, 8), (1, 48), block(1, 48)),
        ((250, 380), (4, 6), (64, 64), block(64, 64)),
        # One block over all of K: per-row or per-tensor numbers, which more backends take.
        ((256, 100), (256, 1), (1, 128), ROW),
        ((100, 100), (1, 1), (128, 128), TENSOR),
        ((100, 100), (1,), (128, 128), TENSOR),
        ((100, 100), (), (100, 100), TENSOR),
        ((256, 100), (2, 1), (128, 128), BLOCK_128),
    ],
)
def test_stated_block_size_says_what_the_grid_means(
    weight: tuple[int, int], scale: tuple[int, ...], stated: tuple[int, int], expected: Recipe
) -> None:
    assert infer_recipe(weight, scale, stated) == expected


@pytest.mark.parametrize(
    ("scale", "stated", "words"),
    [
        ((2, 2), None, r"found \[2, 2\]; pass block_size"),
        ((384,), None, r"\[256\] or \[256, 1\] \(per-row\).*found \[384\]"),
        ((3, 2), None, r"found \[3, 2\]; it fits when transposed: pass weight_scale.t\(\)"),
        ((1, 256), None, r"found \[1, 256\]; it fits when transposed"),
        ((1, 1, 1), None, r"found \[1, 1, 1\]"),
        ((0,), None, r"found \[0\]"),
        ((256, 8), None, r"found \[256, 8\]; pass block_size"),  # groups of 48 must be stated
        ((2, 3), (64, 64), r"\(64, 64\) on a weight \[256, 384\] needs a weight_scale \[4, 6\]"),
        ((256, 1), (128, 128), r"found \[256, 1\], which reads as per-row; drop block_size"),
        ((1,), (128, 128), r"found \[1\], which reads as per-tensor; drop block_size"),
        ((), (128, 128), r"found \[\], which reads as per-tensor"),
    ],
)
def test_scale_that_means_nothing_is_refused(
    scale: tuple[int, ...], stated: tuple[int, int] | None, words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        infer_recipe((256, 384), scale, stated)


@given(n=DIMENSIONS, k=DIMENSIONS, recipe=RECIPES)
def test_stated_recipe_is_found_again_with_the_same_meaning(n: int, k: int, recipe: Recipe) -> None:
    shape = recipe.scale_shape(n, k)
    scale = distinct(shape)

    found = infer_recipe((n, k), shape, recipe.block_size)

    ours = spread(found, n, k, scale)
    torch.testing.assert_close(ours, spread(recipe, n, k, scale), rtol=0, atol=0)
    # Dynamic activations share scales over the same columns, too.
    assert min(found.group_size(k), k) == min(recipe.group_size(k), k)


@given(n=DIMENSIONS, k=DIMENSIONS, recipe=RECIPES, data=st.data())
def test_no_other_reading_of_the_shape_gives_other_numbers(
    n: int, k: int, recipe: Recipe, data: Any
) -> None:
    shape = recipe.scale_shape(n, k)
    if shape == (n, 1) and data.draw(st.booleans()):
        shape = (n,)
    readings = admissible(n, k, shape)

    try:
        found = infer_recipe((n, k), shape)
    except ShapeError:
        assert not readings, f"{shape} reads as {readings} and was refused"
        return

    assert found in readings, f"{shape} was read as {found}, the rules allow {readings}"
    scale = distinct(shape)
    for other in readings:
        same = torch.equal(spread(found, n, k, scale), spread(other, n, k, scale))
        assert same, f"{shape} over [{n}, {k}] reads as {found} and as {other}"


@given(n=DIMENSIONS, k=DIMENSIONS, recipe=RECIPES)
def test_a_grid_of_another_block_size_is_never_taken_for_a_known_one(
    n: int, k: int, recipe: Recipe
) -> None:
    """Unstated, a grid is read by the known sizes alone; a same-shaped grid cannot be told apart,
    any other is refused."""
    shape = recipe.scale_shape(n, k)
    hypothesis.assume(not admissible(n, k, shape))

    with pytest.raises(ShapeError, match=re.escape(f"found {list(shape)}; ")):
        infer_recipe((n, k), shape)


@given(n=st.integers(1, 70), k=st.integers(1, 70), recipe=RECIPES)
def test_dequantize_means_what_the_recipe_means(n: int, k: int, recipe: Recipe) -> None:
    data = torch.ones(n, k).to(torch.float8_e4m3fn)
    scale = distinct(recipe.scale_shape(n, k))
    expected = spread(recipe, n, k, scale)

    stated = dequantize(data, scale, block_size=recipe.block_size, dtype=torch.float32)
    direct = dequantize_strip(data, scale, recipe, torch.float32)

    torch.testing.assert_close(stated, expected, rtol=0, atol=0)
    torch.testing.assert_close(direct, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("tensor", None, TENSOR),
        ("row", None, ROW),
        ("block", None, BLOCK_128),
        ("block", [64, 32], block(64, 32)),
        (Granularity.ROW, None, ROW),
        (Granularity.BLOCK, (1, 32), block(1, 32)),
        (block(1, 32), None, block(1, 32)),
        (block(1, 32), [1, 32], block(1, 32)),
        (TENSOR, None, TENSOR),
    ],
)
def test_parse(name: Any, size: Any, expected: Recipe) -> None:
    parsed = Recipe.parse(name, size)

    assert parsed == expected
    assert hash(parsed) == hash(expected)


@pytest.mark.parametrize(
    ("name", "size", "error", "words"),
    [
        ("blocks", None, InvalidInputError, "one of tensor, row, block, found 'blocks'"),
        ("", None, InvalidInputError, "found ''"),
        ("ROW", None, InvalidInputError, "found 'ROW'"),
        (None, None, InvalidInputError, "found None"),
        (128, None, InvalidInputError, "found 128"),
        ("row", (1, 1), InvalidInputError, "only the block recipe .*'row'"),
        ("tensor", (128, 128), InvalidInputError, "only the block recipe .*'tensor'"),
        (BLOCK_128, (64, 64), InvalidInputError, r"\(64, 64\) contradicts block 128x128"),
        (ROW, (1, 1), InvalidInputError, r"\(1, 1\) contradicts row"),
        ("block", 128, DTypeError, "two integers .*found 128"),
        ("block", (0, 128), ShapeError, r"positive, found \(0, 128\)"),
    ],
)
def test_parse_refuses(name: Any, size: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        Recipe.parse(name, size)

    assert caught.type is error


@pytest.mark.parametrize(
    "size", [(128, 128), [128, 128], torch.Size([128, 128]), range(128, 384, 128)]
)
def test_block_size_is_any_sequence_of_two_integers(size: Any) -> None:
    found = parse_block_size(size)

    assert found == (128, 128 if not isinstance(size, range) else 256)
    assert type(found) is tuple


@pytest.mark.parametrize(
    ("argument", "weight", "scale", "expected"),
    [
        (None, None, None, None),
        ([64, 64], None, None, (64, 64)),
        (None, [64, 64], None, (64, 64)),
        (None, None, [64, 64], (64, 64)),
        (None, [64, 64], (64, 64), (64, 64)),
        # The argument settles what the tensors say, together or apart.
        ([32, 32], [64, 64], None, (32, 32)),
        ([32, 32], [64, 64], [128, 128], (32, 32)),
    ],
)
def test_the_argument_is_stated_before_the_attributes(
    argument: Any, weight: Any, scale: Any, expected: tuple[int, int] | None
) -> None:
    assert stated_block_size(argument, weight, scale) == expected


def test_attributes_that_differ_are_ambiguous() -> None:
    with pytest.raises(AmbiguousRecipeError, match=r"\(64, 64\) and .*\(1, 128\); pass block_size"):
        stated_block_size(None, [64, 64], [1, 128])


@pytest.mark.parametrize(
    ("recipe", "shape", "group", "text"),
    [
        (TENSOR, (1,), 300, "tensor"),
        (ROW, (200, 1), 300, "row"),
        (BLOCK_128, (2, 3), 128, "block 128x128"),
        (block(1, 32), (200, 10), 32, "block 1x32"),
        (block(512, 512), (1, 1), 512, "block 512x512"),
    ],
)
def test_a_recipe_says_its_shapes(
    recipe: Recipe, shape: tuple[int, ...], group: int, text: str
) -> None:
    assert recipe.scale_shape(200, 300) == shape
    assert recipe.group_size(300) == group
    assert str(recipe) == text
