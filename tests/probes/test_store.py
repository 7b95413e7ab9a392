"""Verdicts on disk: kept whole or not at all, and never in the way of a call."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8dispatch.probes import store as store_module
from fp8dispatch.probes.store import WRONG_LASTS_S, Fingerprint, VerdictStore

H100 = Fingerprint(
    backend="fbgemm",
    recipe="block 128x128",
    device="cuda NVIDIA H100",
    capability=(9, 0),
    driver="580.65",
    versions={"torch": "2.11.0+cu130", "cuda": "13.0"},
    fp8dispatch="0.1.0",
)


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> VerdictStore:
    return VerdictStore(tmp_path, Clock())


def only_file(store: VerdictStore) -> Path:
    (path,) = store.directory.glob("*.json")
    return path


def changed(**fields: Any) -> Fingerprint:
    return Fingerprint(**{**H100.model_dump(), **fields})


def test_a_verdict_is_found_again_by_another_process_and_only_by_its_fingerprint(
    store: VerdictStore, tmp_path: Path
) -> None:
    assert store.get(H100) is None
    store.put(H100, "right", "right in 13 calls")

    found = VerdictStore(tmp_path, Clock()).get(H100)
    assert found is not None
    assert (found.state, found.reason) == ("right", "right in 13 calls")
    turned = dict(reversed(H100.versions.items()))
    assert store.get(changed(versions=turned)) is not None
    for other in (
        changed(backend="mslk"),
        changed(recipe="row"),
        changed(device="cuda NVIDIA H200"),
        changed(capability=(9, 1)),
        changed(driver="580.66"),
        changed(versions={"torch": "2.11.1+cu130", "cuda": "13.0"}),
        changed(fp8dispatch="0.1.1"),
    ):
        assert store.get(other) is None, other


def test_a_wrong_verdict_expires_and_a_right_one_does_not(tmp_path: Path) -> None:
    clock = Clock()
    store = VerdictStore(tmp_path, clock)
    row = changed(recipe="row")
    store.put(H100, "wrong", "no image")
    store.put(row, "right", "right")

    clock.now += WRONG_LASTS_S - 1
    assert store.get(H100) is not None
    clock.now += 2
    assert store.get(H100) is None
    assert store.get(row) is not None
    clock.now -= 2 * WRONG_LASTS_S  # the clock was wrong when it was written
    assert store.get(H100) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"\xff\xfe\x00",
        b'{"schema_version": 1}',
        b"[" * 100_000,
        b" " * (1 << 17),
    ],
)
def test_a_damaged_file_is_ignored_and_written_anew(store: VerdictStore, content: bytes) -> None:
    store.put(H100, "right", "right")
    only_file(store).write_bytes(content)
    assert store.get(H100) is None
    store.put(H100, "wrong", "no image")
    found = store.get(H100)
    assert found is not None
    assert found.state == "wrong"


def test_files_of_another_schema_or_fingerprint_are_ignored(store: VerdictStore) -> None:
    store.put(H100, "right", "right")
    path = only_file(store)
    good = json.loads(path.read_text())
    for change in (
        {"schema_version": 2},
        {"state": "excellent"},
        {"more": 1},
        {"fingerprint": {**good["fingerprint"], "driver": "1"}},
    ):
        path.write_text(json.dumps({**good, **change}))
        assert store.get(H100) is None, change
    path.write_text(path.read_text()[:-9])  # truncated
    assert store.get(H100) is None


def test_clear_deletes_verdicts_and_what_a_killed_writer_left(store: VerdictStore) -> None:
    assert store.clear() == 0
    store.put(H100, "right", "right")
    store.put(changed(recipe="row"), "right", "right")
    (store.directory / "leftover.tmp").write_text("{")
    assert store.clear() == 2
    assert store.get(H100) is None
    assert list(store.directory.iterdir()) == []


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_once_and_leaves_the_old_file(
    store: VerdictStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(H100, "right", "right")
    monkeypatch.setattr(os, "fsync", full_disk)
    with caplog.at_level(logging.WARNING, "fp8dispatch"):
        store.put(H100, "wrong", "no image")
        store.put(H100, "wrong", "no image")
    found = store.get(H100)

    assert found is not None
    assert found.state == "right"
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert "FP8DISPATCH_CACHE_DIR" in caplog.text
    assert [path.suffix for path in store.directory.iterdir()] == [".json"]


def test_a_directory_that_cannot_be_made_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = VerdictStore(tmp_path / "file")
    with caplog.at_level(logging.WARNING, "fp8dispatch"):
        assert store.get(H100) is None
        with store.probing(H100, wait_s=0) as mine:
            assert mine
        store.put(H100, "right", "right")
        assert store.get(H100) is None
    assert len(caplog.records) == 1


def test_a_directory_that_is_read_only_is_still_read(
    store: VerdictStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(H100, "right", "right")

    def read_only(*arguments: object, **named: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    # The tests may run as root, whom permissions do not stop.
    monkeypatch.setattr(store_module, "write_atomically", read_only)
    monkeypatch.setattr(store_module.FileLock, "acquire", read_only)
    with caplog.at_level(logging.WARNING, "fp8dispatch"):
        assert store.get(H100) is not None
        with store.probing(changed(recipe="row"), wait_s=5) as mine:
            assert mine
        store.put(changed(recipe="row"), "right", "right")
    assert len(caplog.records) == 1


_HOLD = """
import sys
from pathlib import Path
from fp8dispatch.probes.store import Fingerprint, VerdictStore
fingerprint = Fingerprint.model_validate_json(sys.argv[2])
with VerdictStore(Path(sys.argv[1])).probing(fingerprint, wait_s=30) as mine:
    print("holding", mine, flush=True)
    sys.stdin.read()
"""


def test_one_process_probes_and_a_killed_one_frees_the_others(tmp_path: Path) -> None:
    store = VerdictStore(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path), H100.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding True\n"
        with store.probing(H100, wait_s=0) as mine:
            assert not mine
        with store.probing(changed(recipe="row"), wait_s=0) as mine:
            assert mine, "another fingerprint is another question"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with store.probing(H100, wait_s=30) as mine:
            assert mine


def test_an_error_inside_frees_the_lock(store: VerdictStore) -> None:
    with pytest.raises(RuntimeError, match="canary"), store.probing(H100, wait_s=0):
        raise RuntimeError("canary")
    with store.probing(H100, wait_s=0) as mine:
        assert mine
