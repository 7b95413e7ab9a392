"""A packed checkpoint opened for reading: which modules it holds, and their values in strips."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.checkpoint import Checkpoint, resolve_inside
from fp8dispatch.pack.jsonfiles import read_object
from fp8dispatch.pack.layouts import codec
from fp8dispatch.pack.layouts.contract import JSON, Contents, PackedModule, Role
from fp8dispatch.pack.layouts.native import METADATA_FILE
from fp8dispatch.pack.layouts.reading import TensorHeader, read_contents
from fp8dispatch.quantization.weight import block_of, dequantize_strip
from fp8dispatch.recipe import ceil_div

METADATA_FILES = ("hf_quant_config.json", METADATA_FILE)
"""JSON files beside ``config.json`` that say how a checkpoint is quantised."""

STRIP_BYTES = 8 << 20
"""About how many FP8 codes are in memory at a time."""

_NAN_CODES = {  # code & mask == value, for the codes that mean NaN or infinity
    torch.float8_e4m3fn: (0x7F, 0x7F),
    torch.float8_e5m2: (0x7C, 0x7C),
    torch.float8_e4m3fnuz: (0xFF, 0x80),
    torch.float8_e5m2fnuz: (0xFF, 0x80),
}


@dataclass(frozen=True)
class PackedCheckpoint:
    """A checkpoint and what its quantised modules are.

    Attributes:
        checkpoint: headers and files.
        contents: modules, schemes, skipped modules, KV scales, format.
        files: the metadata files that are there, by name.
    """

    checkpoint: Checkpoint
    contents: Contents
    files: dict[str, JSON]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PackedCheckpoint:
        """Read headers and configuration; no tensor is read.

        Raises:
            CheckpointError: anything missing, damaged or contradictory; see `Checkpoint.open` and
                `read_contents`.
        """
        checkpoint = Checkpoint.open(path)
        files = metadata_files(checkpoint.folder)
        headers = {
            name: TensorHeader(tensor.dtype, tensor.shape, tensor.file)
            for name, tensor in checkpoint.tensors.items()
        }
        try:
            contents = read_contents(checkpoint.config or {}, files, headers)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from error
        return cls(checkpoint, contents, files)

    def weight_scale(self, module: PackedModule) -> torch.Tensor:
        """fp32 multipliers of a module in the shape of its recipe.

        Raises:
            CheckpointError: scales that are NaN, infinite or negative.
        """
        return self._decoded(module, Role.WEIGHT_SCALE)

    def activation_scale(self, module: PackedModule) -> torch.Tensor | None:
        """The static activation scale of a module, fp32 [1], if it has one.

        Raises:
            CheckpointError: a scale that is not positive and finite.
        """
        found = module.tensor(Role.ACTIVATION_SCALE)
        return None if found is None else self._decoded(module, Role.ACTIVATION_SCALE)

    def _decoded(self, module: PackedModule, role: Role) -> torch.Tensor:
        stored = next(tensor for tensor in module.tensors if tensor.role is role)
        file = self.checkpoint.tensor(stored.name)
        values = self.checkpoint.read(stored.name)
        return codec.decode(module, role, values, str(self.checkpoint.folder / file.file))

    def codes(self, module: PackedModule) -> Iterator[tuple[int, torch.Tensor]]:
        """FP8 codes of a module in strips of whole blocks: first row, and codes [rows, K].

        Raises:
            CheckpointError: a code that means NaN or infinity.
        """
        tensor = self.checkpoint.tensor(module.tensors[0].name)
        for start, strip in self.checkpoint.strips(tensor.name, strip_rows(module)):
            bad = nonfinite_codes(strip)
            if bad:
                raise CheckpointError(
                    f"{self.checkpoint.folder / tensor.file}: {tensor.name} must hold finite "
                    f"codes, found {bad} that mean NaN or infinity in rows {start} to "
                    f"{start + len(strip) - 1}; pack the model again from its source"
                )
            yield start, strip

    def all_codes(self, module: PackedModule) -> torch.Tensor:
        """FP8 codes of a module [N, K], all at once.

        Raises:
            CheckpointError: a code that means NaN or infinity.
        """
        tensor = self.checkpoint.tensor(module.tensors[0].name)
        codes = self.checkpoint.read(tensor.name)
        bad = nonfinite_codes(codes)
        if bad:
            raise CheckpointError(
                f"{self.checkpoint.folder / tensor.file}: {tensor.name} must hold finite codes, "
                f"found {bad} that mean NaN or infinity; pack the model again from its source"
            )
        return codes

    def stored_scale(self, module: PackedModule) -> torch.Tensor:
        """The weight scales of a module in the dtype of the file and the shape of its recipe.

        Raises:
            CheckpointError: scales that are NaN, infinite or negative.
        """
        self.weight_scale(module)  # raises on such values
        stored = next(tensor for tensor in module.tensors if tensor.role is Role.WEIGHT_SCALE)
        return self.checkpoint.read(stored.name).reshape(
            module.scheme.recipe.scale_shape(*module.shape)
        )

    def values(
        self, module: PackedModule, dtype: torch.dtype
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Restored values of a module in strips: first row, and ``codes * scale`` [rows, K],
        multiplied in fp32 and rounded once to `dtype`.

        Raises:
            CheckpointError: codes or scales that are not finite, or a value beyond `dtype`.
        """
        scale = self.weight_scale(module)
        for start, strip in self.codes(module):
            values = restore(module, strip, scale, start, dtype)
            if not bool(torch.isfinite(values).all()):
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {module.name}.weight must fit {dtype}, found "
                    f"values beyond it in rows {start} to {start + len(strip) - 1}; use a wider "
                    f"dtype"
                )
            yield start, values


def restore(
    module: PackedModule,
    strip: torch.Tensor,
    scale: torch.Tensor,
    start: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``codes * scale`` of a strip that `PackedCheckpoint.codes` gave.

    Args:
        module: the module.
        strip: its codes from row `start`, which begins a block.
        scale: all its multipliers, fp32 in the recipe's shape.
    """
    n, k = module.shape
    recipe = module.scheme.recipe
    rows, columns = block_of(recipe, n, k)
    grid = scale.reshape(ceil_div(n, rows), ceil_div(k, columns))
    part = grid[start // rows : ceil_div(start + len(strip), rows)]
    return dequantize_strip(strip, part, recipe, dtype)


def strip_rows(module: PackedModule) -> int:
    """Rows to read at a time: about `STRIP_BYTES`, in whole blocks; any number where one scale
    serves the whole weight."""
    rows = max(1, STRIP_BYTES // module.shape[1])
    size = module.scheme.recipe.block_size
    return rows if size is None else max(1, rows // size[0]) * size[0]


def nonfinite_codes(codes: torch.Tensor) -> int:
    """How many FP8 codes mean NaN or infinity."""
    mask, value = _NAN_CODES[codes.dtype]
    return int(((codes.view(torch.uint8) & mask) == value).sum())


def metadata_files(folder: Path) -> dict[str, JSON]:
    """The metadata files of a folder that are there, by name.

    Raises:
        CheckpointError: one that cannot be read.
    """
    return {
        name: read_object(resolve_inside(folder, name))
        for name in METADATA_FILES
        if (folder / name).exists()
    }
