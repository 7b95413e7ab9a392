"""Headers of safetensors files: read with bounds, checked, and written as safetensors writes them.

A file is eight bytes of little-endian length, that much JSON, then the tensors' bytes one after
another without gaps (https://github.com/huggingface/safetensors, section "Format"). A header comes
from strangers, so every number in it is checked against the file before anything is read or
allocated after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.jsonfiles import parse_object

MAX_HEADER_BYTES = 32 << 20
"""Longest header that is read: some 200,000 tensors. The largest published ones stay below 8 MB."""
MAX_RANK = 8
MAX_NAME_LENGTH = 1024
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_METADATA = "__metadata__"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class StoredDType:
    """A dtype as safetensors names it.

    Attributes:
        bits: of one element; formats below a byte are only ever copied.
        torch: torch's dtype, or None where torch has none.
    """

    bits: int
    torch: torch.dtype | None


# In the order of safetensors' own list: a file holds its tensors by this order, last one first.
DTYPES: dict[str, StoredDType] = {
    "BOOL": StoredDType(8, torch.bool),
    "F4": StoredDType(4, None),
    "F6_E2M3": StoredDType(6, None),
    "F6_E3M2": StoredDType(6, None),
    "U8": StoredDType(8, torch.uint8),
    "I8": StoredDType(8, torch.int8),
    "F8_E5M2": StoredDType(8, torch.float8_e5m2),
    "F8_E4M3": StoredDType(8, torch.float8_e4m3fn),
    "F8_E8M0": StoredDType(8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": StoredDType(8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": StoredDType(8, torch.float8_e5m2fnuz),
    "I16": StoredDType(16, torch.int16),
    "U16": StoredDType(16, torch.uint16),
    "F16": StoredDType(16, torch.float16),
    "BF16": StoredDType(16, torch.bfloat16),
    "I32": StoredDType(32, torch.int32),
    "U32": StoredDType(32, torch.uint32),
    "F32": StoredDType(32, torch.float32),
    "C64": StoredDType(64, torch.complex64),
    "F64": StoredDType(64, torch.float64),
    "I64": StoredDType(64, torch.int64),
    "U64": StoredDType(64, torch.uint64),
}
_ORDER = {name: place for place, name in enumerate(DTYPES)}
_STORED = {dtype.torch: name for name, dtype in DTYPES.items() if dtype.torch is not None}


def stored_dtype(dtype: torch.dtype) -> str:
    """``"BF16"`` for ``torch.bfloat16``: the name that a header uses.

    Raises:
        CheckpointError: a dtype that safetensors has no name for.
    """
    if dtype not in _STORED:
        raise CheckpointError(
            f"a tensor to be written needs a dtype that safetensors stores, found {dtype}; convert "
            f"it first"
        )
    return _STORED[dtype]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor in a file.

    Attributes:
        name: its name in the checkpoint.
        dtype: safetensors' name of the dtype, a key of `DTYPES`.
        shape: its shape, row-major.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        specs: name -> tensor, in the order of the data.
        offsets: name -> where the tensor's bytes begin in the file.
        metadata: the strings under ``__metadata__``.
        file_bytes: size of the whole file.
    """

    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of one file; no tensor is read.

    Raises:
        CheckpointError: a file that is not a whole, consistent safetensors file.
    """
    return parse_header(*_raw_header(path), str(path))


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The JSON of a header and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length_field = file.read(_LENGTH_BYTES)
            if len(length_field) < _LENGTH_BYTES:
                raise CheckpointError(
                    f"{path}: a safetensors file needs 8 bytes of header length, found a file "
                    f"of {size} bytes; fetch it again"
                )
            length = int.from_bytes(length_field, "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: the header must be at most {MAX_HEADER_BYTES} bytes long, found "
                    f"{length}; this is not a safetensors file, or a damaged one"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the file must be readable, found: {error.strerror or error}; check the path "
            f"and its permissions"
        ) from error
    if len(text) < length:
        raise CheckpointError(
            f"{path}: the header needs {length} bytes, found {len(text)}; the file is cut off, "
            f"fetch it again"
        )
    return text, size


def parse_header(text: bytes, file_bytes: int, where: str) -> Header:
    """Check the JSON of a header against the size of its file.

    Args:
        text: the JSON, without the eight bytes of length.
        file_bytes: size of the file that it was read from.
        where: how errors name the file.

    Raises:
        CheckpointError: anything that safetensors itself would refuse, duplicate names, names
            with control characters, or bytes that two tensors share.
    """
    parsed = parse_object(text, where)
    metadata = _metadata(parsed.pop(_METADATA, {}), where)
    start = _LENGTH_BYTES + len(text)
    entries = [
        (_spec(name, entry, where), _offsets(name, entry, where)) for name, entry in parsed.items()
    ]
    entries.sort(key=lambda entry: entry[1])
    reached = 0
    for spec, (begin, end) in entries:
        _check_place(spec, begin, end, reached, file_bytes - start, where)
        reached = end
    if reached != file_bytes - start:
        raise CheckpointError(
            f"{where}: the tensors must fill the file to its end, found {file_bytes - start} bytes "
            f"of data and tensors for {reached}; the file is damaged, fetch it again"
        )
    return Header(
        {spec.name: spec for spec, _ in entries},
        {spec.name: start + begin for spec, (begin, _) in entries},
        metadata,
        file_bytes,
    )


def _metadata(found: object, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or any(not isinstance(text, str) for text in found.values()):
        raise CheckpointError(
            f"{where}: {_METADATA} must hold strings only, found {_short(found)}; write the file "
            f"again with safetensors"
        )
    return dict(found)


def _spec(name: str, entry: object, where: str) -> TensorSpec:
    if not name or len(name) > MAX_NAME_LENGTH or _CONTROL.search(name):
        raise CheckpointError(
            f"{where}: a tensor's name must have 1 to {MAX_NAME_LENGTH} printable characters, "
            f"found {_short(name)}; rename the tensor"
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: tensor {name!r} needs exactly dtype, shape and data_offsets, found "
            f"{_short(entry)}; write the file again with safetensors"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: tensor {name!r} needs a dtype out of {', '.join(DTYPES)}, found "
            f"{_short(dtype)}; convert the tensor"
        )
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise CheckpointError(
            f"{where}: tensor {name!r} needs a shape of integers from 0, found {_short(shape)}; "
            f"the file is damaged, fetch it again"
        )
    spec = TensorSpec(name, dtype, tuple(shape))
    if len(shape) > MAX_RANK or prod(shape) >= 2**63:
        raise CheckpointError(
            f"{where}: tensor {name!r} needs a shape of at most {MAX_RANK} dimensions and 2**63 "
            f"elements, found {_short(shape)}; the file is damaged, fetch it again"
        )
    return spec


def _offsets(name: str, entry: Any, where: str) -> tuple[int, int]:
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(
            f"{where}: tensor {name!r} needs two data_offsets from 0, found {_short(offsets)}; the "
            f"file is damaged, fetch it again"
        )
    return offsets[0], offsets[1]


def _check_place(
    spec: TensorSpec, begin: int, end: int, reached: int, available: int, where: str
) -> None:
    """A tensor that begins where the one before it ended, fits its shape, and is in the file."""
    if end - begin != spec.nbytes:
        raise CheckpointError(
            f"{where}: tensor {spec.name!r} needs {spec.nbytes} bytes for {spec.dtype} "
            f"{list(spec.shape)}, found data_offsets {[begin, end]}; the file is damaged, fetch it "
            f"again"
        )
    if end > available:
        raise CheckpointError(
            f"{where}: tensor {spec.name!r} needs data up to byte {end}, found {available} bytes "
            f"of data; the file is cut off, fetch it again"
        )
    if begin != reached:
        what = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
        raise CheckpointError(
            f"{where}: tensor {spec.name!r} must begin at byte {reached} of the data, found "
            f"{begin}, which {what}; write the file again with safetensors"
        )


def encode_header(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, up to its data, and where each tensor's bytes begin.

    The tensors lie in safetensors' own order (widest dtype first, then by name), so the file is
    the one that ``safetensors.torch.save_file`` writes.

    Raises:
        CheckpointError: a header longer than `MAX_HEADER_BYTES`.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    reached = 0
    for spec in sorted(specs, key=lambda spec: (-_ORDER[spec.dtype], spec.name)):
        begins[spec.name] = reached
        reached += spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begins[spec.name], reached],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"a file's header must be at most {MAX_HEADER_BYTES} bytes long, found {len(text)} for "
            f"{len(begins)} tensors; split the checkpoint into shards"
        )
    start = _LENGTH_BYTES + len(text)
    return (
        len(text).to_bytes(_LENGTH_BYTES, "little") + text,
        {name: start + begin for name, begin in begins.items()},
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
