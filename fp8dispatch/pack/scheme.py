"""How one linear weight is quantised, apart from any file format; plain data without torch.

A scheme's scale is the multiplier of ``value = data * scale``, in the shape that its recipe gives
(`Recipe.scale_shape`); what a file format calls it and how it shapes it is in `layouts/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fp8dispatch.errors import InvalidInputError
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe

FLOAT8_NAMES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
SCALE_NAMES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
"""Names of torch dtypes; a uint8 scale holds E8M0 exponents."""


AMAX, MSE = "amax", "mse"
SCALES = (AMAX, MSE)
"""How a weight's scales are found: the largest value becomes the largest code, or the least squared
error of some candidates. Both give a scale of the same meaning, so no format tells them apart."""


class Activations(str, Enum):
    """How the input of a layer is quantised when the layer runs."""

    DYNAMIC = "dynamic"  # from its own amax: per token, or per token and block_k columns
    STATIC = "static"  # with one calibrated scale
    NONE = "none"  # not at all: only the weight is FP8


@dataclass(frozen=True)
class Scheme:
    """How one weight [N, K] is quantised.

    Attributes:
        recipe: over what one weight scale stretches; a group of g columns is a block (1, g).
        dtype: FP8 dtype of the weight, one of `FLOAT8_NAMES`.
        scale_dtype: dtype that the weight scales are rounded to before the data is divided by
            them, one of `SCALE_NAMES`. A format stores exactly these values.
        activations: how the layer's input is quantised.
    """

    recipe: Recipe
    dtype: str = "float8_e4m3fn"
    scale_dtype: str = "float32"
    activations: Activations = Activations.DYNAMIC

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("dtype", self.dtype, FLOAT8_NAMES),
            ("scale_dtype", self.scale_dtype, SCALE_NAMES),
        ):
            if value not in allowed:
                raise InvalidInputError(
                    f"a scheme's {what} must be one of {', '.join(allowed)}, found {value!r}"
                )
        if self.activations is Activations.STATIC and self.recipe.block_size is not None:
            raise InvalidInputError(
                f"static activations need a weight scale per tensor or row, found {self.recipe}; "
                f"use dynamic activations with blocks"
            )

    @property
    def group_size(self) -> int | None:
        """g of a group scheme, that is of a block (1, g); None for every other."""
        size = self.recipe.block_size
        return size[1] if size is not None and size[0] == 1 else None

    @property
    def e8m0(self) -> bool:
        """Whether the scales are powers of two stored as exponents."""
        return self.scale_dtype in ("float8_e8m0fnu", "uint8")

    def __str__(self) -> str:
        recipe = f"group {self.group_size}" if self.group_size is not None else str(self.recipe)
        exponents = " with E8M0 scales" if self.e8m0 else ""
        return f"{recipe}{exponents}, {self.activations.value} activations"


def _group(size: int) -> Scheme:
    return Scheme(Recipe(Granularity.BLOCK, (1, size)))


SCHEMES: dict[str, Scheme] = {
    "block128": Scheme(BLOCK_128),
    "channel": Scheme(ROW),
    "tensor-static": Scheme(TENSOR, activations=Activations.STATIC),
    "group32": _group(32),
    "group64": _group(64),
    "group128": _group(128),
    "block128-ue8m0": Scheme(BLOCK_128, scale_dtype="float8_e8m0fnu"),
    "mxfp8": Scheme(Recipe(Granularity.BLOCK, (1, 32)), scale_dtype="uint8"),
}
"""The schemes that have a name on the command line."""


def parse_scheme(name: str | Scheme) -> Scheme:
    """A scheme from its name in `SCHEMES`.

    Raises:
        InvalidInputError: no scheme has this name.
    """
    if isinstance(name, Scheme):
        return name
    if name not in SCHEMES:
        raise InvalidInputError(f"recipe must be one of {', '.join(SCHEMES)}, found {name!r}")
    return SCHEMES[name]
