"""Packing that is killed and taken up again: whole files or none, and the same bytes."""

from __future__ import annotations

import os
import random
import signal
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fp8dispatch import PackOptions, pack_checkpoint
from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack import output as output_module
from fp8dispatch.pack import rawio, writer
from tests.pack.folders import files_of, write_model
from tests.pack.test_plan import CONFIG, Q_PROJ, llama

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A source of four files, and what packing it without a kill gives."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_model(folder / "in", llama(layers=2), CONFIG, shards=4)
    pack_checkpoint(source, folder / "out", PackOptions(recipe="block128", keep_master=True))
    yield source, files_of(folder / "out")


def killed(source: Path, out: Path, event: int) -> bool:
    """Pack in a child that kills itself at its n-th write or rename; whether it came to that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside torch's threads
        child = os.fork()
    if child == 0:
        left = [event]

        def counted(function: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        writer.write_at = counted(rawio.write_at)
        rawio.publish = output_module.publish = counted(rawio.publish)
        pack_checkpoint(source, out, PackOptions(recipe="block128", keep_master=True), workers=2)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@FORK
@pytest.mark.parametrize("seed", range(6))
def test_a_kill_at_any_point_and_a_resume_give_the_same_bytes(
    tmp_path: Path, whole: tuple[Path, dict[str, bytes]], seed: int
) -> None:
    """About 130 writes and renames; the first kill is at any of them, the others soon after."""
    source, expected = whole
    out = tmp_path / "out"
    generator = random.Random(seed)
    kills = [generator.randrange(1, 130), generator.randrange(1, 20), generator.randrange(1, 20)]
    for event in kills:
        if not killed(source, out, event):
            break
        for name, content in files_of(out).items():
            if not name.startswith(".fp8dispatch/"):
                assert content == expected[name], "what has a final name is complete"

    done = (
        pack_checkpoint(source, out, PackOptions(recipe="block128", keep_master=True), force=False)
        if (out / ".fp8dispatch").exists()
        else None
    )
    assert done is None or done.resumed or kills[0] < 3
    assert files_of(out) == expected


@FORK
def test_other_options_do_not_resume(tmp_path: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    source, _ = whole
    assert killed(source, tmp_path / "out", 60)
    same = PackOptions(recipe="block128", keep_master=True)

    for other in (
        replace(same, recipe="block128-ue8m0"),
        replace(same, layout="native"),
        replace(same, skip=(Q_PROJ,)),
        replace(same, keep_master=False),
        replace(same, scales="mse"),
    ):
        with pytest.raises(CheckpointError, match="must be resumed with the same source and opt"):
            pack_checkpoint(source, tmp_path / "out", other)
    with pytest.raises(CheckpointError, match="must be resumed with the same source and options"):
        pack_checkpoint(source, tmp_path / "out", same, report=False)
