"""How many bytes a model takes before and after quantisation: shapes in, plain numbers out.

Nothing is loaded and torch is not imported, so a plan can be made from the header of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from fp8dispatch.errors import DTypeError, ShapeError
from fp8dispatch.recipe import BLOCK_128, Recipe

DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("float64", "int64"), 64),
    **dict.fromkeys(("float32", "int32"), 32),
    **dict.fromkeys(("bfloat16", "float16", "int16"), 16),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 8),
    **dict.fromkeys(("float8_e8m0fnu", "int8", "uint8", "bool"), 8),
}
"""Bits of one element, by the dtype's name."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data.

    Attributes:
        shape: its sizes.
        dtype: its dtype's name, such as ``"bfloat16"``.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the data.

        Raises:
            DTypeError, ShapeError: a dtype that is not known, or a negative size.
        """
        if self.dtype not in DTYPE_BITS:
            raise DTypeError(
                f"a dtype must be one of {', '.join(DTYPE_BITS)}, found {self.dtype!r}"
            )
        if any(size < 0 for size in self.shape):
            raise ShapeError(f"sizes must not be negative, found {list(self.shape)}")
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a model's tensors.

    Attributes:
        recipe: how the quantised ones are scaled, as text.
        quantized: names of the tensors that become FP8.
        before: bytes of all tensors as they are.
        data: bytes of the FP8 data afterwards.
        scales: bytes of the scales afterwards.
        kept: bytes of the tensors that stay as they are.
    """

    recipe: str
    quantized: tuple[str, ...]
    before: int
    data: int
    scales: int
    kept: int

    @property
    def after(self) -> int:
        """Bytes of all tensors afterwards, scales included."""
        return self.data + self.scales + self.kept

    @property
    def saved(self) -> float:
        """The share of the bytes that is saved, 0.49 for 49 percent."""
        return 1 - self.after / self.before if self.before else 0.0


def scale_bytes(shape: tuple[int, ...], recipe: Recipe, scale_dtype: str = "float32") -> int:
    """Bytes of the scales of a weight [N, K], or of stacked experts' weights [E, N, K].

    Args:
        shape: of the weight.
        recipe: what a scale stretches over.
        scale_dtype: the scales' dtype by name.

    Raises:
        ShapeError: fewer than two or more than three dimensions.
        DTypeError: a dtype that is not known.
    """
    if len(shape) not in (2, 3):
        raise ShapeError(f"a weight must be [N, K] or [experts, N, K], found {list(shape)}")
    per_weight = TensorSpec(recipe.scale_shape(*shape[-2:]), scale_dtype).nbytes
    return per_weight * (shape[0] if len(shape) == 3 else 1)


def estimate_memory(
    tensors: Mapping[str, TensorSpec],
    recipe: str | Recipe = BLOCK_128,
    *,
    quantized: Callable[[str, TensorSpec], bool] | None = None,
    scale_dtype: str = "float32",
    weight_dtype: str = "float8_e4m3fn",
) -> MemoryEstimate:
    """What quantising a model's weights saves.

    Args:
        tensors: name -> shape and dtype.
        recipe: ``"tensor"``, ``"row"``, ``"block"`` or a `Recipe`; groups are blocks (1, g).
        quantized: which tensors become FP8, called with name and spec. None takes every float
            tensor of two or three dimensions whose name ends with ``weight`` or a projection's
            ``proj``, but not embeddings, norms, routers and the output head.
        scale_dtype: the scales' dtype by name.
        weight_dtype: the FP8 dtype by name.

    Raises:
        InvalidInputError: an unknown recipe or dtype.
    """
    chosen = Recipe.parse(recipe)
    choose = is_linear_weight if quantized is None else quantized
    names = tuple(name for name, spec in tensors.items() if choose(name, spec))
    wanted = set(names)
    return MemoryEstimate(
        recipe=str(chosen),
        quantized=names,
        before=sum(spec.nbytes for spec in tensors.values()),
        data=sum(TensorSpec(tensors[name].shape, weight_dtype).nbytes for name in names),
        scales=sum(scale_bytes(tensors[name].shape, chosen, scale_dtype) for name in names),
        kept=sum(spec.nbytes for name, spec in tensors.items() if name not in wanted),
    )


def compare_recipes(
    tensors: Mapping[str, TensorSpec], recipes: Iterable[str | Recipe]
) -> tuple[MemoryEstimate, ...]:
    """`estimate_memory` for several recipes, in their order."""
    return tuple(estimate_memory(tensors, recipe) for recipe in recipes)


_KEPT_HIGH = ("embed", "norm", "router", "lm_head", "score", "wte", "wpe", "conv", "rotary")


def is_linear_weight(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor looks like the weight of a linear layer that is usually quantised.

    A rule of thumb on names and shapes for an estimate; packing decides by its own table.
    """
    if len(spec.shape) not in (2, 3) or not name.endswith(("weight", "proj")):
        return False
    if not spec.dtype.startswith(("float", "bfloat")) or spec.dtype.startswith("float8"):
        return False
    return not any(part in name.lower() for part in _KEPT_HIGH) and ".gate.weight" not in name
