"""What a result file says about the machine that it was measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fp8dispatch


def describe() -> dict[str, Any]:
    """GPU, driver and versions, as plain data."""
    versions = {"fp8dispatch": fp8dispatch.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "nvidia-cublas"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions,
    }
    if torch.cuda.is_available():
        smi = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver, power limit"] = smi.stdout.strip()
    return facts


def write(path: str, result: dict[str, Any]) -> None:
    """Write a result with the description of this machine."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": describe(), **result}, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")
    print(f"wrote {path}")
