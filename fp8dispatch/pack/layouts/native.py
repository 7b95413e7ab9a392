"""The project's own format: every scheme, with the metadata of each tensor in ``fp8dispatch.json``.

| tensor                        | dtype, shape         | meaning                          |
|-------------------------------|----------------------|----------------------------------|
| ``X.weight``                  | FP8 [N, K]           | the codes                        |
| ``X.weight_scale``            | the recipe's shape   | multiplier: value = data * scale |
| ``X.weight_scale_reciprocal`` | F32, the same shape  | 1 / scale                        |
| ``X.activation_scale``        | F32 [1], when static | multiplier of the input          |

Both directions of the scale are stored, each under a name that says which it is, because others
use ``scale`` and ``scale_inv`` for either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.jsonfiles import check_model
from fp8dispatch.pack.layouts.contract import (
    DTYPE_NAMES,
    JSON,
    Contents,
    Layout,
    PackedModule,
    Role,
    StoredTensor,
)
from fp8dispatch.pack.layouts.shapes import linear_skips, read_scheme_as, simple_tensors
from fp8dispatch.pack.scheme import Activations, Scheme
from fp8dispatch.recipe import ROW, TENSOR, Granularity, Recipe

METADATA_FILE = "fp8dispatch.json"
VERSION = 1
NAME = "fp8dispatch"
FormatName = Literal["E4M3", "E5M2", "E4M3FNUZ", "E5M2FNUZ"]
_FORMATS: dict[FormatName, str] = {
    "E4M3": "float8_e4m3fn",
    "E5M2": "float8_e5m2",
    "E4M3FNUZ": "float8_e4m3fnuz",
    "E5M2FNUZ": "float8_e5m2fnuz",
}


class TensorMetadata(BaseModel):
    """What ``fp8dispatch.json`` says of one module.

    Attributes:
        format: the FP8 format of the codes.
        layout: how the codes lie in memory.
        granularity: over what one scale stretches.
        group_size: columns that share a scale; None for tensor and row scales.
        block_rows: rows that share a scale where columns are grouped.
        scale: name of the tensor of multipliers.
        scale_inv: name of the tensor of ``1 / scale``.
        activations: dynamic, static or none.
        activation_scale: name of the static activation scale, if any.
        amax_history: seed of delayed scaling: largest |input| of past batches, newest first.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: FormatName
    layout: Literal["row-major [N, K]"]
    granularity: Literal["tensor", "row", "block"]
    group_size: int | None = Field(gt=0)
    block_rows: int | None = Field(gt=0)
    scale: str
    scale_inv: str
    activations: Literal["dynamic", "static", "none"]
    activation_scale: str | None
    amax_history: list[float]

    def recipe(self) -> Recipe:
        """The recipe that these fields mean."""
        if self.granularity == "block":
            return Recipe(Granularity.BLOCK, (self.block_rows or 1, self.group_size or 1))
        return TENSOR if self.granularity == "tensor" else ROW


class Native(Layout):
    """Everything fp8dispatch can run; read by fp8dispatch only."""

    name: ClassVar[str] = "native"

    def refuse(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[str, ...]:
        """See `Layout`. Nothing is refused: a scheme that exists has a native form."""
        return ()

    def tensors(
        self, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        scale_shape = scheme.recipe.scale_shape(*shape)
        weight, scale, *others = simple_tensors(
            module,
            scheme,
            shape,
            scale="weight_scale",
            scale_shape=scale_shape,
            activation="activation_scale",
        )
        reciprocal = StoredTensor(
            f"{module}.weight_scale_reciprocal", Role.WEIGHT_SCALE_RECIPROCAL, "F32", scale_shape
        )
        return weight, scale, reciprocal, *others

    def config(self, contents: Contents) -> JSON:
        """See `Layout`. There is no ``quant_method``: without it Transformers refuses the model,
        while under a name that it does not know it would take the codes for values."""
        return {
            "format": NAME,
            "version": VERSION,
            "metadata": METADATA_FILE,
            "modules_to_not_convert": linear_skips(contents),
        }

    def extra_files(self, contents: Contents) -> dict[str, JSON]:
        """The metadata of every module, by name."""
        modules = {name: self._metadata(module) for name, module in contents.modules.items()}
        return {
            METADATA_FILE: {
                "version": VERSION,
                "scale": "value = data * scale",
                "scale_inv": "1 / scale",
                "modules": {name: modules[name].model_dump() for name in sorted(modules)},
            }
        }

    def _metadata(self, module: PackedModule) -> TensorMetadata:
        scheme = module.scheme
        size = scheme.recipe.block_size
        names = {tensor.role: tensor.name for tensor in self.tensors(module.name, scheme, (1, 1))}
        return TensorMetadata(
            format=next(key for key, name in _FORMATS.items() if name == scheme.dtype),
            layout="row-major [N, K]",
            granularity=scheme.recipe.granularity.value,
            group_size=None if size is None else size[1],
            block_rows=None if size is None else size[0],
            scale=names[Role.WEIGHT_SCALE],
            scale_inv=names[Role.WEIGHT_SCALE_RECIPROCAL],
            activations=scheme.activations.value,
            activation_scale=names.get(Role.ACTIVATION_SCALE),
            amax_history=list(module.amax_history),
        )

    def claims(self, block: JSON) -> bool:
        """See `Layout`."""
        return block.get("format") == NAME and "quant_method" not in block

    def read_scheme(self, block: JSON, files: Mapping[str, JSON], module: PackedModule) -> Scheme:
        """See `Layout`."""
        metadata = module_metadata(files, module.name)
        dtype = _FORMATS[metadata.format]
        weight = module.tensors[0]
        if DTYPE_NAMES[dtype] != weight.dtype:
            raise CheckpointError(
                f"{weight.name} must be {DTYPE_NAMES[dtype]} as {METADATA_FILE} says, found "
                f"{weight.dtype}; pack the model again"
            )
        said = f"{metadata.recipe()} ({METADATA_FILE})"
        scheme = read_scheme_as(module, (metadata.recipe(),), said)
        if scheme.activations is Activations.DYNAMIC and metadata.activations == "none":
            return Scheme(scheme.recipe, scheme.dtype, scheme.scale_dtype, Activations.NONE)
        if scheme.activations.value != metadata.activations:
            raise CheckpointError(
                f"{module.name} must have {metadata.activations} activations as {METADATA_FILE} "
                f"says, found tensors for {scheme.activations.value} ones; take the complete "
                f"checkpoint"
            )
        return scheme

    def amax_history(self, files: Mapping[str, JSON], module: str) -> tuple[float, ...]:
        """See `Layout`."""
        return tuple(module_metadata(files, module).amax_history)


def module_metadata(files: Mapping[str, JSON], module: str) -> TensorMetadata:
    """What ``fp8dispatch.json`` says of a module.

    Raises:
        CheckpointError: the file is missing, of another version, or says nothing valid of it.
    """
    content = files.get(METADATA_FILE)
    if content is None:
        raise CheckpointError(
            f"a native checkpoint needs {METADATA_FILE}, found none; take the complete folder"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{METADATA_FILE} must be of version {VERSION}, found {content.get('version')!r:.40}; "
            f"use the fp8dispatch that wrote it"
        )
    modules = content.get("modules")
    if not isinstance(modules, dict) or module not in modules:
        raise CheckpointError(
            f"{METADATA_FILE} must describe {module}, whose weight is FP8, found nothing; pack the "
            f"model again"
        )
    return check_model(modules[module], TensorMetadata, f"{METADATA_FILE}: {module}")
