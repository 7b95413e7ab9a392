"""A tiny checkpoint, a text and the command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fp8dispatch import cli
from tests.calibrate.models import llama, save_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

LINES = [f"sample {index}:{' the quick brown fox' * (index % 4 + 1)}" for index in range(40)]


def main(*arguments: object) -> int:
    return cli.main(["calibrate", *map(str, arguments)])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(llama(), tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(LINES))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "stats.json"
