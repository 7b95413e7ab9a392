"""Headers of safetensors files: ours are safetensors' own, and damaged ones are refused."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.header import (
    DTYPES,
    MAX_HEADER_BYTES,
    TensorSpec,
    encode_header,
    parse_header,
    read_header,
    stored_dtype,
)
from tests.pack.folders import assert_one_sentence, entry, header, raw_file

if TYPE_CHECKING:
    from pathlib import Path

TORCH_NAMES = [name for name, dtype in DTYPES.items() if dtype.torch is not None]


@given(
    st.dictionaries(
        st.text("abc.é_0", min_size=1, max_size=6),
        st.tuples(st.sampled_from(TORCH_NAMES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_headers_are_those_that_safetensors_writes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    made = {
        name: torch.zeros(shape, dtype=torch.uint8).to(DTYPES[dtype].torch)
        for name, (dtype, shape) in tensors.items()
    }
    save_file(made, path, metadata={"format": "pt"})
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]

    ours, offsets = encode_header(specs, {"format": "pt"})
    theirs = path.read_bytes()
    found = read_header(path)

    assert theirs.startswith(ours)
    assert len(theirs) == len(ours) + sum(spec.nbytes for spec in specs) == found.file_bytes
    assert dict(found.offsets) == offsets
    assert dict(found.specs) == {spec.name: spec for spec in specs}
    assert found.metadata == {"format": "pt"}


def test_a_file_made_of_our_header_loads(tmp_path: Path) -> None:
    head, _ = encode_header([TensorSpec("w", "F8_E4M3", (2, 2))], {})
    (tmp_path / "x.safetensors").write_bytes(head + bytes([0x38, 0x40, 0xB8, 0]))

    (loaded,) = load_file(tmp_path / "x.safetensors").values()

    assert loaded.dtype == torch.float8_e4m3fn
    assert loaded.float().tolist() == [[1, 2], [-1, 0]]


SMALL = b"\0" * 4
DAMAGED: dict[str, tuple[bytes, bytes, str]] = {
    "no JSON": (b"{nonsense", b"", "well formed"),
    "another kind": (b"[1, 2]", b"", "must be an object, found list"),
    "not UTF-8": (b'{"\xff": 1}', b"", "well formed"),
    "a name twice": (
        b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        "the key 'w' twice",
    ),
    "nested too deeply": (b'{"a":' * 60_000, b"", "nested too deeply"),
    "NaN": (b'{"w": NaN}', b"", "the constant NaN"),
    "unknown dtype": (header(w=entry("F9")), SMALL, "'w' needs a dtype out of BOOL, .* found 'F9'"),
    "dtype no string": (header(w=entry(["U8"])), SMALL, "'w' needs a dtype"),
    "missing key": (header(w={"dtype": "U8", "shape": [4]}), SMALL, "exactly dtype, shape and"),
    "additional key": (header(w={**entry(), "x": 1}), SMALL, "exactly dtype, shape and"),
    "entry no object": (header(w=3), SMALL, "exactly dtype, shape and data_offsets, found 3"),
    "negative size": (header(w=entry(shape=(-4,))), SMALL, r"from 0, found \[-4\]"),
    "fractional size": (header(w=entry(shape=(4.0,))), SMALL, r"from 0, found \[4.0\]"),
    "boolean size": (header(w=entry(shape=(True, 4))), SMALL, "from 0, found"),
    "huge size": (header(w=entry(shape=(2**40, 2**40))), SMALL, r"2\*\*63 elements"),
    "size beyond int64": (header(w=entry(shape=(2**70,))), SMALL, "integers from 0"),
    "many dimensions": (header(w=entry(shape=(1,) * 100_000)), SMALL, "at most 8 dimensions"),
    "negative offset": (header(w=entry(offsets=(-4, 0))), SMALL, r"from 0, found \[-4, 0\]"),
    "reversed offsets": (header(w=entry(offsets=(4, 0))), SMALL, r"4 bytes .* found .*\[4, 0\]"),
    "three offsets": (header(w=entry(offsets=(0, 4, 8))), SMALL, "two data_offsets"),
    "too few bytes": (header(w=entry("F32")), SMALL, r"16 bytes for F32 \[4\], found .*\[0, 4\]"),
    "oversized": (header(w=entry(shape=(9,), offsets=(0, 9))), SMALL, "up to byte 9, found 4"),
    "truncated": (header(w=entry()), b"\0\0", "up to byte 4, found 2 bytes"),
    "overlap": (
        header(a=entry(), w=entry(offsets=(2, 6))),
        b"\0" * 6,
        "'w' must begin at byte 4 .* found 2, which overlaps",
    ),
    "gap": (header(a=entry(), w=entry(offsets=(6, 10))), b"\0" * 10, "found 6, which leaves a gap"),
    "bytes left over": (header(w=entry()), b"\0" * 9, "found 9 bytes of data and tensors for 4"),
    "control characters": (header(**{"w\x1b[2J": entry()}), SMALL, "printable characters"),
    "empty name": (header(**{"": entry()}), SMALL, "printable characters"),
    "long name": (header(**{"w" * 2000: entry()}), SMALL, "1 to 1024 printable characters"),
    "metadata of numbers": (b'{"__metadata__":{"a":1}}', b"", "must hold strings only"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_one_sentence_that_names_it(tmp_path: Path, what: str) -> None:
    text, data, words = DAMAGED[what]
    path = raw_file(tmp_path / "bad.safetensors", text, data)

    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert_one_sentence(str(caught.value), path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "8 bytes of header length, found a file of 0 bytes"),
        (b"\1\0\0", "8 bytes of header length, found a file of 3 bytes"),
        (
            struct.pack("<Q", 2**63) + b"{}",
            "at most 33554432 bytes long, found 9223372036854775808",
        ),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most 33554432 bytes"),
        (struct.pack("<Q", 1000) + b"{}", "needs 1000 bytes, found 2; the file is cut off"),
        (b"\x80\x02}q\x00X\x03\x00", "at most 33554432 bytes"),  # the beginning of a pickle
    ],
)
def test_a_wrong_length_of_the_header(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert_one_sentence(str(caught.value), path)


@given(st.data())
def test_any_bytes_are_a_header_or_an_error(data: st.DataObject) -> None:
    """Whatever is changed in a right header, it is read or refused, never a crash."""
    good = header(a=entry(), w=entry("BF16", (1, 2), (4, 8)))
    spot = data.draw(st.integers(0, len(good) - 1))
    changed = good[:spot] + data.draw(st.binary(max_size=3)) + good[spot + 1 :]
    try:
        found = parse_header(changed, 8 + len(changed) + 8, "x")
    except CheckpointError:
        return
    for name, spec in found.specs.items():
        assert 0 <= found.offsets[name] <= found.offsets[name] + spec.nbytes <= found.file_bytes


def test_a_dtype_that_no_file_holds() -> None:
    with pytest.raises(CheckpointError, match=r"found torch.complex128"):
        stored_dtype(torch.complex128)
