"""The installed torch as its files tell of it: read, never run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fp8dispatch.probes.torch_build import TorchBuild, read_torch_build

# As the build of torch writes it: 2.10 and later with types, earlier ones without.
TYPED = """from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']
__version__ = '2.11.0+cu130'
debug = False
cuda: Optional[str] = '13.0'
git_version = '0123'
hip: Optional[str] = None
"""
PLAIN = "__version__ = version = '2.9.1+rocm6.4'\ncuda = None\nhip = '6.4.43482'\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an import would look for torch, with nothing there."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch")
    importlib.invalidate_caches()
    return tmp_path


def package(folder: Path, version: str | bytes | None, code: str = "raise SystemExit\n") -> Path:
    torch = folder / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text(code, "utf-8")
    if version is not None:
        text = version.encode() if isinstance(version, str) else version
        (torch / "version.py").write_bytes(text)
    return torch


def test_the_torch_that_runs_here() -> None:
    build = read_torch_build()

    assert build == TorchBuild(str(torch.__version__), torch.version.cuda, torch.version.hip)


@pytest.mark.parametrize(
    ("text", "expected", "versions"),
    [
        (TYPED, TorchBuild("2.11.0+cu130", "13.0"), {"torch": "2.11.0+cu130", "cuda": "13.0"}),
        (
            PLAIN,
            TorchBuild("2.9.1+rocm6.4", None, "6.4.43482"),
            {"torch": "2.9.1+rocm6.4", "hip": "6.4.43482"},
        ),
        (
            "__version__ = '2.13.0+cpu'\ncuda: str = f()\ndel cuda\n",
            TorchBuild("2.13.0+cpu"),
            {"torch": "2.13.0+cpu"},
        ),
    ],
)
def test_read_without_running_it(
    folder: Path, text: str, expected: TorchBuild, versions: dict[str, str]
) -> None:
    package(folder, text)

    found = read_torch_build()

    assert found == expected
    assert found.versions() == versions
    assert "torch" not in sys.modules


def test_none(folder: Path) -> None:
    assert read_torch_build() == TorchBuild(problem="it is not installed")


def test_what_an_uninstallation_left(folder: Path) -> None:
    (folder / "torch" / "lib").mkdir(parents=True)

    assert read_torch_build().problem == f"{folder / 'torch'} is called torch and is no package"


def test_a_file_called_torch(folder: Path) -> None:
    (folder / "torch.py").write_text("raise SystemExit\n", "utf-8")

    assert read_torch_build().problem == f"{folder / 'torch.py'} is called torch and is no package"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "No such file"),
        ("__version__ = \n", "invalid syntax"),
        (b"__version__ = '\xff'\n", "utf-8"),
        (b"\0", "null bytes"),
        ("__version__ = make_version()\n", "states no version"),
        ("", "states no version"),
    ],
)
def test_a_version_file_that_says_nothing(
    folder: Path, text: str | bytes | None, problem: str
) -> None:
    place = package(folder, text) / "version.py"

    build = read_torch_build()

    assert build.problem is not None
    assert str(place) in build.problem
    assert problem in build.problem
    assert build.versions() == {}


def test_an_import_hook_that_raises(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hook:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            raise AttributeError("as planted")

    monkeypatch.setattr(sys, "meta_path", [Hook(), *sys.meta_path])

    assert read_torch_build().problem == "AttributeError: as planted"
