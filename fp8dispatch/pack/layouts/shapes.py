"""What several formats share: the shapes a recipe's scale may have on disk, and usual refusals."""

from __future__ import annotations

from math import prod

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.layouts.contract import (
    DTYPE_NAMES,
    Contents,
    PackedModule,
    Role,
    StoredTensor,
)
from fp8dispatch.pack.scheme import Activations, Scheme
from fp8dispatch.recipe import Granularity, Recipe

TORCH_NAMES: dict[str, str] = {stored: name for name, stored in DTYPE_NAMES.items()}
"""safetensors' dtype name -> torch's, the inverse of `DTYPE_NAMES`."""


def scale_fits(recipe: Recipe, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
    """Whether a stored scale shape is one that some format uses for this recipe.

    Per tensor: one element. Per row: [N] or [N, 1]. Blocks: the grid, also as ModelOpt's
    [ceil(N / bn), 1, ceil(K / bk), 1].
    """
    if recipe.granularity is Granularity.TENSOR:
        return prod(stored) == 1
    n, k = shape
    if recipe.granularity is Granularity.ROW:
        return stored in ((n,), (n, 1))
    rows, columns = recipe.scale_shape(n, k)
    return stored in ((rows, columns), (rows, 1, columns, 1))


def weight_scale_of(module: PackedModule) -> StoredTensor:
    """The stored weight scale of a module that was read; reading made sure that there is one."""
    scale = module.tensor(Role.WEIGHT_SCALE)
    if scale is None:
        raise CheckpointError(
            f"{module.name}.weight is FP8 and needs a weight scale, found none; take the complete "
            f"checkpoint"
        )
    return scale


def read_scheme_as(module: PackedModule, recipes: tuple[Recipe, ...], said: str) -> Scheme:
    """The scheme of a stored module whose configuration allows these recipes.

    Args:
        module: name, shape and stored tensors.
        recipes: in order of preference; the first one that the scale's shape fits is taken.
        said: what the configuration says, for the error.

    Raises:
        CheckpointError: the scale's shape fits none of them.
    """
    scale = weight_scale_of(module)
    weight = module.tensors[0]
    for recipe in recipes:
        if scale_fits(recipe, module.shape, scale.shape):
            return Scheme(
                recipe,
                TORCH_NAMES[weight.dtype],
                TORCH_NAMES[scale.dtype],
                _activations(module, recipe),
            )
    n, k = module.shape
    wanted = " or ".join(str(list(recipe.scale_shape(n, k))) for recipe in recipes)
    raise CheckpointError(
        f"{scale.name} must have shape {wanted} for a weight [{n}, {k}] where the configuration "
        f"says {said}, found {list(scale.shape)}; correct the configuration or pack the model again"
    )


def _activations(module: PackedModule, recipe: Recipe) -> Activations:
    if module.tensor(Role.ACTIVATION_SCALE) is None:
        return Activations.DYNAMIC
    if recipe.block_size is not None:
        raise CheckpointError(
            f"{module.name} needs dynamic activations beside a weight in blocks ({recipe}), found "
            f"a static activation scale; pack it with dynamic activations"
        )
    return Activations.STATIC


def simple_tensors(
    module: str,
    scheme: Scheme,
    shape: tuple[int, int],
    *,
    scale: str,
    scale_shape: tuple[int, ...],
    activation: str = "input_scale",
    activation_shape: tuple[int, ...] = (1,),
) -> tuple[StoredTensor, ...]:
    """Weight, weight scale and, for static activations, the activation scale of a module."""
    tensors = [
        StoredTensor(f"{module}.weight", Role.WEIGHT, DTYPE_NAMES[scheme.dtype], shape),
        StoredTensor(
            f"{module}.{scale}", Role.WEIGHT_SCALE, DTYPE_NAMES[scheme.scale_dtype], scale_shape
        ),
    ]
    if scheme.activations is Activations.STATIC:
        tensors.append(
            StoredTensor(f"{module}.{activation}", Role.ACTIVATION_SCALE, "F32", activation_shape)
        )
    return tuple(tensors)


def refuse_dtypes(
    layout: str, scheme: Scheme, scale_dtypes: tuple[str, ...] = ("float32",)
) -> list[str]:
    """Refusals of a format that holds E4M3 weights with scales of these dtypes."""
    found = []
    if scheme.dtype != "float8_e4m3fn":
        found.append(f"{layout} holds float8_e4m3fn weights, found {scheme.dtype}; use native")
    if scheme.scale_dtype not in scale_dtypes:
        found.append(
            f"{layout} holds {' or '.join(scale_dtypes)} scales for {scheme.recipe}, found "
            f"{scheme.scale_dtype}; use native"
        )
    return found


def same_schemes(schemes: set[Scheme], layout: str) -> tuple[str, ...]:
    """The refusal of a format whose configuration states one scheme for the whole model."""
    if len(schemes) <= 1:
        return ()
    return (
        f"{layout} states one scheme for the whole model, found {len(schemes)}: "
        f"{'; '.join(sorted(map(str, schemes)))}; use one recipe, or compressed-tensors or native",
    )


def linear_skips(contents: Contents) -> list[str]:
    """The full names to list as left alone, in order; an output head is always among them, since
    readers add their own guesses to a list that does not mention it."""
    names = set(contents.skipped)
    if "lm_head" not in contents.modules:
        names.add("lm_head")
    return sorted(names)
