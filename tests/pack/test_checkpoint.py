"""Opening checkpoints: files, indexes, the hub's cache; and every trap in them refused."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.checkpoint import Checkpoint, is_plain_name, part_of, read_rows, read_tensor
from tests.pack.folders import (
    assert_one_sentence,
    entry,
    header,
    raw_file,
    same_bytes,
    write_model,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TENSORS = {
    "a.weight": torch.randn(5, 8, dtype=torch.bfloat16),
    "b.weight": torch.randn(3, 4).to(torch.float8_e4m3fn),
    "c": torch.tensor(2.5),
    "d": torch.empty(0, 4),
    "e": torch.arange(6).reshape(3, 2),
}


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_tensor_is_read_as_it_is(tmp_path: Path, shards: int) -> None:
    opened = Checkpoint.open(write_model(tmp_path, TENSORS, {"model_type": "bert"}, shards))

    assert set(opened.tensors) == set(TENSORS)
    assert opened.config == {"model_type": "bert"}
    assert opened.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, expected in TENSORS.items():
        assert same_bytes(opened.read(name), expected), name


def test_strips_are_the_tensor_in_order(tmp_path: Path) -> None:
    opened = Checkpoint.open(write_model(tmp_path, TENSORS))

    strips = list(opened.strips("a.weight", 2))

    assert [start for start, _ in strips] == [0, 2, 4]
    assert same_bytes(torch.cat([strip for _, strip in strips]), TENSORS["a.weight"])
    assert same_bytes(read_rows(opened.tensor("e"), 1, 3), TENSORS["e"][1:3])


def test_an_expert_of_a_fused_tensor_is_a_tensor(tmp_path: Path) -> None:
    experts = torch.randn(3, 4, 6)
    opened = Checkpoint.open(write_model(tmp_path, {"experts": experts}))

    expert = part_of(opened.tensor("experts"), 2)

    assert same_bytes(read_tensor(expert), experts[2])


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TENSORS)

    opened = Checkpoint.open(folder / "model.safetensors")

    assert set(opened.tensors) == set(TENSORS) and opened.index is None


def hub_cache(root: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    """A model's folder as the hub's client lays it out: links in snapshots, files in blobs."""
    model = root / "models--owner--name"
    real = write_model(root / "download", tensors, shards=2)
    snapshot = model / "snapshots" / "abc123"
    (model / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(real.iterdir())):
        blob = model / "blobs" / f"{number:064x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc123")
    return model


@pytest.mark.parametrize("place", [".", "snapshots/abc123"])
def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, place: str) -> None:
    opened = Checkpoint.open(hub_cache(tmp_path) / place)

    assert same_bytes(opened.read("a.weight"), TENSORS["a.weight"])
    assert opened.other_files() == []


def test_files_that_belong_to_the_model_are_listed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TENSORS, shards=2)
    for name in (
        *("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "modeling_x.py"),
        *("1_Pooling/config.json", "2_Dense/model.safetensors", "pytorch_model.bin"),
        *("consolidated.safetensors", ".git/config", "original/consolidated.00.pth", ".hidden"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")

    names = [name for name, _ in Checkpoint.open(folder).other_files()]

    assert sorted(names) == [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "chat_template.jinja",
        "modeling_x.py",
        "preprocessor_config.json",
        "tokenizer.json",
    ]


def index(folder: Path, weight_map: Any) -> Path:
    """An index with this map beside what is in the folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def leading_out(folder: Path) -> Path:
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    raw_file(folder / "out" / "real.safetensors", header(w=entry()), b"\0" * 4)
    (folder / "in" / "model.safetensors").symlink_to(folder / "out" / "real.safetensors")
    return folder / "in"


def in_two_files(folder: Path) -> Path:
    for name in ("a.safetensors", "b.safetensors"):
        raw_file(folder / name, header(w=entry()), b"\0" * 4)
    other = raw_file(
        folder / "b.safetensors", header(w=entry(), v=entry(offsets=(4, 8))), b"\0" * 8
    )
    return index(other.parent, {"w": "a.safetensors", "v": "b.safetensors"})


def with_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder

    return make


def with_config(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        raw_file(folder / "model.safetensors", header(w=entry()), b"\0" * 4)
        return with_file("config.json", content)(folder)

    return make


def looping(folder: Path) -> Path:
    (folder / "model.safetensors").symlink_to("model.safetensors")
    return folder


def missing_tensor(folder: Path) -> Path:
    raw_file(folder / "a.safetensors", header(w=entry()), b"\0" * 4)
    return index(folder, {"w": "a.safetensors", "v": "a.safetensors"})


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda f: f / "absent", "must be an existing folder or file"),
    "an empty folder": (lambda f: f, "needs model.safetensors.index.json, model.safetensors or"),
    "a pickle": (with_file("pytorch_model.bin", b"x"), "found a pickle, .*; load it with torch.lo"),
    "a GGUF file": (
        with_file("model.Q4_1.gguf", b"GGUF"),
        "found GGUF, .* already; restore it with transformers' .*gguf_file='model.Q4_1.gguf'",
    ),
    "a GGUF file by name": (
        lambda f: raw_file(f / "m.gguf", b"{}"),
        "must be in safetensors files, found GGUF",
    ),
    "a pickle by name": (
        lambda f: with_file("weights.pt", b"x")(f) / "weights.pt",
        "found a pickle, which can run code when it is loaded; load it with torch.load",
    ),
    "a pickle in the index": (lambda f: index(f, {"w": "a.bin"}), "found a pickle"),
    "parent folders": (lambda f: index(f, {"w": "../../etc/passwd"}), "found '../../etc/passwd'"),
    "an absolute name": (lambda f: index(f, {"w": "/etc/passwd"}), "in a file beside the index"),
    "a drive": (lambda f: index(f, {"w": "c:a.safetensors"}), "in a file beside the index"),
    "a Windows path": (lambda f: index(f, {"w": "..\\a.safetensors"}), "a file beside the index"),
    "a subfolder": (lambda f: index(f, {"w": "sub/a.safetensors"}), "a file beside the index"),
    "no name": (lambda f: index(f, {"w": ""}), "in a file beside the index, found ''"),
    "another kind": (lambda f: index(f, {"w": "a.h5"}), "in a .safetensors file, found 'a.h5'"),
    "a missing file": (lambda f: index(f, {"w": "a.safetensors"}), "must exist, found: No such"),
    "an index of numbers": (lambda f: index(f, {"w": 3}), "weight_map.w must fit Index"),
    "an index of lists": (lambda f: index(f, []), "weight_map must fit Index"),
    "an empty index": (lambda f: index(f, {}), "weight_map must fit Index"),
    "a link that leads out": (leading_out, "a link must lead to a file of the same folder"),
    "a link to itself": (looping, "must exist, found"),
    "a tensor in two files": (in_two_files, "'w' must be in one file, found it in a.safetensors"),
    "a tensor that is not there": (missing_tensor, "'v' must be in a.safetensors, found none"),
    "a list as configuration": (with_config(b"[]"), "must be an object, found list"),
    "a huge configuration": (with_config(b" " * (9 << 20)), "at most 8388608 bytes"),
    "a key twice": (with_config(b'{"model_type": "a", "model_type": "b"}'), "'model_type' twice"),
    "an infinite number": (with_config(b'{"eps": Infinity}'), "the constant Infinity"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_sentence(tmp_path: Path, what: str) -> None:
    make, words = HOSTILE[what]
    path = make(tmp_path)

    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(path)
    assert_one_sentence(str(caught.value), tmp_path)


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TENSORS)
    opened = Checkpoint.open(folder)
    os.truncate(folder / "model.safetensors", opened.tensor("a.weight").offset + 10)

    with pytest.raises(CheckpointError, match=r"80 bytes were expected .* found 10; the file was"):
        opened.read("a.weight")


def test_a_hostile_reference_of_the_cache(tmp_path: Path) -> None:
    model = hub_cache(tmp_path)
    (model / "refs" / "main").write_text("../../../etc")

    with pytest.raises(CheckpointError, match="name of a snapshot was expected"):
        Checkpoint.open(model)


def test_a_companion_file_that_leads_out_is_refused(tmp_path: Path) -> None:
    """Else packing would copy any file of this machine into a folder that is then published."""
    (tmp_path / "secret").write_text("s")
    folder = write_model(tmp_path / "model", TENSORS)
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")

    with pytest.raises(CheckpointError, match="a link must lead to a file of the same folder"):
        Checkpoint.open(folder).other_files()


@pytest.mark.parametrize(
    ("name", "plain"),
    [("model-1.safetensors", True), ("..", False), ("a\0b", False), ("a\nb", False), ("", False)],
)
def test_plain_names(name: str, plain: bool) -> None:
    assert is_plain_name(name) is plain
