"""Runs a script that compiles kernels for GPUs that are not here, and reads what it found.

In a child process: this one may run kernels under the interpreter, and Triton settles that when it
is imported. No import of triton here either: its assembler is a program for Linux inside the wheel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None,
    reason="needs Triton's compiler, which exists for Linux",
)


def facts_of(script: str, folders: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler made of every variant of a script beside this file."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folders.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found: dict[str, dict[str, Any]] = json.loads(child.stdout)
    found.pop("triton", None)  # which one compiled
    return found
