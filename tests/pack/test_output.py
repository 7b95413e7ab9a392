"""The output folder: complete files or none, resumed after a crash, never in its own source."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.checkpoint import Checkpoint
from fp8dispatch.pack.header import TensorSpec, stored_dtype
from fp8dispatch.pack.output import OutputFolder, OutputShard, source_fingerprint
from fp8dispatch.pack.rawio import write_at, write_whole
from tests.pack.folders import assert_one_sentence, files_of, same_bytes, write_model

TENSORS = {f"t{i}": torch.randn(4, i + 1) for i in range(5)}


def source_of(folder: Path) -> Checkpoint:
    return Checkpoint.open(write_model(folder / "in", TENSORS, shards=3))


def shards_of(source: Checkpoint) -> list[OutputShard]:
    """The same files again."""
    return [
        OutputShard(file, tuple(header.specs.values())) for file, header in source.headers.items()
    ]


def copy_all(output: OutputFolder, stop_after: int = 99) -> None:
    """Write at most `stop_after` files, then fail as a crash would."""
    for number, shard in enumerate(output.pending()):
        with output.shard(shard, {"number": number}) as writer:
            for spec in shard.specs:
                writer.copy(output.source.tensor(spec.name))
            if number == stop_after:
                raise KeyboardInterrupt
    output.finish({"model_type": "x"}, {"extra.json": b"{}"}, leave_out=["stale.json"])


def job(
    folder: Path, source: Checkpoint, fingerprint: str = "one", **options: bool
) -> OutputFolder:
    return OutputFolder(folder, source, shards_of(source), fingerprint, **options)


def test_a_copy_is_whole_and_loads(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    for name in ("tokenizer.json", "stale.json"):
        (tmp_path / "in" / name).write_text("{}")
    out = tmp_path / "deep" / "out"

    with job(out, source) as output:
        copy_all(output)

    copied = Checkpoint.open(out)
    assert all(same_bytes(copied.read(name), tensor) for name, tensor in TENSORS.items())
    assert copied.config == {"model_type": "x"}
    assert {"tokenizer.json", "extra.json"} <= set(files_of(out))
    assert not (out / "stale.json").exists()
    assert not (out / ".fp8dispatch").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}
    for file in copied.headers:
        assert same_bytes(*(load_file(f / file).popitem()[1] for f in (out, tmp_path / "in")))


def test_a_killed_job_goes_on_where_it_was(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    with job(tmp_path / "whole", source) as output:
        copy_all(output)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), job(out, source) as output:
        copy_all(output, stop_after=1)

    left = files_of(out)
    assert [name for name in left if name.endswith(".safetensors")] == [
        "model-00001-of-00003.safetensors"
    ], "the file that was being written has no final name"
    assert "config.json" not in left
    with job(out, source) as output:
        assert output.resumed
        assert len(output.pending()) == 2
        copy_all(output)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_finished_file_that_was_damaged_is_written_again(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), job(out, source) as output:
        copy_all(output, stop_after=2)
    first = out / "model-00001-of-00003.safetensors"
    first.write_bytes(first.read_bytes()[:-1])

    with job(out, source) as output:
        assert next(shard.file for shard in output.pending()) == first.name


def test_another_job_does_not_go_on_with_these_files(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), job(out, source) as output:
        copy_all(output, stop_after=1)

    with pytest.raises(CheckpointError, match="same source and options, found") as caught:
        job(out, source, "another").__enter__()
    assert_one_sentence(str(caught.value), out)
    with job(out, source, "another", force=True) as output:
        assert not output.resumed and len(output.pending()) == 3
    with job(out, source, "another", resume=False) as output:
        assert not output.resumed


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    (tmp_path / "out" / ".fp8dispatch").mkdir(parents=True)

    with (
        FileLock(tmp_path / "out" / ".fp8dispatch" / "lock"),
        pytest.raises(CheckpointError, match=r"one process at a time .* found another one at work"),
        job(tmp_path / "out", source),
    ):
        pass


@pytest.mark.parametrize("place", ["in", "in/sub", "in/../in"])
def test_the_source_is_never_written_into(tmp_path: Path, place: str) -> None:
    source = source_of(tmp_path)
    before = files_of(tmp_path)

    with (
        pytest.raises(CheckpointError, match="must lie outside the source") as caught,
        job(tmp_path / place, source, force=True),
    ):
        pass
    assert_one_sentence(str(caught.value), tmp_path)
    assert files_of(tmp_path) == before


def test_a_folder_with_something_in_it_needs_force(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    out = write_model(tmp_path / "out", {"old": torch.ones(3)})
    (out / "notes.txt").write_text("mine")

    with (
        pytest.raises(CheckpointError, match=r"must be new or empty, found config.json"),
        job(out, source),
    ):
        pass
    with job(out, source, force=True) as output:
        copy_all(output)
    assert set(Checkpoint.open(out).tensors) == set(TENSORS)
    assert not (out / "model.safetensors").exists(), "loaders prefer it to the index"
    assert (out / "notes.txt").read_text() == "mine"


def test_the_journal_of_a_job_killed_after_its_last_file_goes_away(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    out = tmp_path / "out"
    with job(out, source) as output:
        copy_all(output)
    whole = files_of(out)
    (out / ".fp8dispatch").mkdir()
    (out / ".fp8dispatch" / "lock").touch()

    with pytest.raises(CheckpointError, match="must be new or empty"), job(out, source):
        pass
    assert files_of(out) == whole


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 8, 1000))

    with (
        pytest.raises(CheckpointError, match="bytes of free space, found 1000; free some"),
        job(tmp_path / "out", source),
    ):
        pass
    assert not [name for name in files_of(tmp_path / "out") if "safetensors" in name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_meanwhile_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="found: No space left on device; free") as caught:
        write_at(Path("/dev/full"), 0, b"x")
    assert_one_sentence(str(caught.value), "/dev/full")


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    (tmp_path / "file").write_text("x")

    with pytest.raises(CheckpointError, match="found: Not a directory; "):
        job(tmp_path / "file" / "out", source).__enter__()
    with pytest.raises(CheckpointError, match="found: File exists; "):
        write_whole(tmp_path / "t", tmp_path / "file" / "x.json", b"{}")


def test_a_file_as_output_folder(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    (tmp_path / "out").write_text("x")

    with pytest.raises(CheckpointError, match="must be a folder"), job(tmp_path / "out", source):
        pass


def test_a_tensor_is_written_whole_and_no_further(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    wanted = torch.arange(12, dtype=torch.int32)
    shard = OutputShard("model.safetensors", (TensorSpec("x", stored_dtype(wanted.dtype), (12,)),))

    def attempt(*pieces: tuple[torch.Tensor, int]) -> None:
        with (
            OutputFolder(tmp_path / "out", source, [shard], "one", force=True) as output,
            output.shard(shard) as writer,
        ):
            for piece, start in pieces:
                writer.write("x", piece, start)

    with pytest.raises(CheckpointError, match="'x' must be written whole, found 8 bytes missing"):
        attempt((wanted[:10], 0))
    with pytest.raises(CheckpointError, match="'x' holds 48 bytes, found more"):
        attempt((wanted, 1))
    with pytest.raises(CheckpointError, match=r"'x' was announced as I32, found torch.float32"):
        attempt((wanted.float(), 0))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    attempt((wanted[5:], 5), (wanted[:5], 0))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["x"], wanted)


def test_the_fingerprint_is_of_the_source(tmp_path: Path) -> None:
    one = source_fingerprint(source_of(tmp_path))
    assert source_fingerprint(Checkpoint.open(tmp_path / "in")) == one
    (tmp_path / "in" / "config.json").write_text('{"model_type": "other"}')
    two = source_fingerprint(Checkpoint.open(tmp_path / "in"))
    write_model(tmp_path / "in", {**TENSORS, "t0": TENSORS["t0"] + 1}, {"model_type": "other"}, 3)
    three = source_fingerprint(Checkpoint.open(tmp_path / "in"))

    assert len({one, two, three}) == 3
