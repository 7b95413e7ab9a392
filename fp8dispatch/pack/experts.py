"""Fused experts: one 3-D tensor that holds a matrix for each expert, cut into the matrices.

The shape alone does not say which way the matrices lie ([E, N, K] and [E, K, N] can be equal), nor
whether gate and up follow each other or alternate. So the layout comes from the model's type, as
its code in Transformers reads the file, and a type that is not listed is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.checkpoint import FileTensor, part_of, read_rows, read_tensor

if TYPE_CHECKING:
    import torch

Orientation = Literal["nk", "kn", "config"]

LAYOUTS: Mapping[str, Orientation] = {
    "llama4": "kn",
    "llama4_text": "kn",
    "qwen3_vl_moe": "config",
    "qwen3_vl_moe_text": "config",
    "qwen3_5_moe": "nk",
    "qwen3_5_moe_text": "nk",
}
"""Model type -> how each expert's matrix lies: [N, K], [K, N], or as its config's sizes show."""

_FUSED = re.compile(r"^(?P<parent>.*\bexperts)\.(?P<leaf>gate_up_proj|down_proj)(\.weight)?$")
_EXPERTS = re.compile(r"experts?(\.|_|$)|(input|output)_linear\.weight$")


@dataclass(frozen=True)
class WeightSource:
    """A matrix [N, K] that is to be quantised, wherever it lies in a checkpoint.

    Attributes:
        tensor: a 2-D tensor: the matrix itself, or for `columns` its transpose.
        columns: of the tensor, which are the matrix's rows; None when the tensor is the matrix.
    """

    tensor: FileTensor
    columns: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, width = self.tensor.shape
        if self.columns is None:
            return rows, width
        return self.columns[1] - self.columns[0], rows

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the matrix. A transposed one is read whole for any of them."""
        if self.columns is None:
            return read_rows(self.tensor, start, stop)
        left = self.columns[0]
        return read_tensor(self.tensor)[:, left + start : left + stop].t().contiguous()


def is_fused(tensor: FileTensor) -> bool:
    """Whether a tensor holds the matrices of several experts."""
    return len(tensor.shape) == 3 and _EXPERTS.search(tensor.name) is not None


def split(
    tensor: FileTensor, types: tuple[str, ...], config: Mapping[str, Any] | None
) -> dict[str, WeightSource]:
    """The matrices of a fused tensor: ``experts.0.gate_proj`` and so on -> where each lies.

    Raises:
        CheckpointError: a model type or a name whose layout is not known, or sizes that do not fit.
    """
    named = _FUSED.match(tensor.name)
    kind = next((kind for kind in types if kind in LAYOUTS), None)
    if named is None or kind is None:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} {list(tensor.shape)} holds fused experts, "
            f"whose layout must be known for the model type ({', '.join(LAYOUTS)}), found "
            f"{types[0] if types else 'no type'}; keep it in high precision with --skip "
            f"'{tensor.name}', or convert the model to one weight per expert"
        )
    gate_up = named["leaf"] == "gate_up_proj"
    transposed = _transposed(tensor, LAYOUTS[kind], gate_up, config)
    n = tensor.shape[2] if transposed else tensor.shape[1]
    if gate_up and n % 2:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} {list(tensor.shape)} must hold gate and up of "
            f"equal size, found {n} rows for both; fetch the checkpoint again"
        )
    parts = {"gate_proj": (0, n // 2), "up_proj": (n // 2, n)} if gate_up else {"down_proj": (0, n)}
    return {
        f"{named['parent']}.{expert}.{leaf}": _matrix(part_of(tensor, expert), rows, transposed)
        for expert in range(tensor.shape[0])
        for leaf, rows in parts.items()
    }


def _matrix(expert: FileTensor, rows: tuple[int, int], transposed: bool) -> WeightSource:
    if transposed:
        return WeightSource(expert, rows)
    row_bytes = expert.nbytes // expert.shape[0]
    part = replace(expert, shape=(rows[1] - rows[0], expert.shape[1]))
    return WeightSource(replace(part, offset=expert.offset + rows[0] * row_bytes))


def _transposed(
    tensor: FileTensor,
    orientation: Orientation,
    gate_up: bool,
    config: Mapping[str, Any] | None,
) -> bool:
    """Whether each expert lies as [K, N]."""
    if orientation != "config":
        return orientation == "kn"
    text = (config or {}).get("text_config")
    source = text if isinstance(text, dict) else config or {}
    hidden, inner = source.get("hidden_size"), source.get("moe_intermediate_size")
    if isinstance(hidden, int) and isinstance(inner, int):
        n, k = (2 * inner, hidden) if gate_up else (hidden, inner)
        fits = [tuple(tensor.shape[1:]) == shape for shape in ((n, k), (k, n))]
        if fits == [False, True] or fits == [True, False]:
            return fits[1]
    raise CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} {list(tensor.shape)} holds experts that must be "
        f"told apart from their transpose by hidden_size and moe_intermediate_size, found {hidden} "
        f"and {inner}; keep it in high precision with --skip '{tensor.name}'"
    )
