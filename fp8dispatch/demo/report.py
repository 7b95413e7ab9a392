"""What the demo found, as data that goes to a file."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

MIN_COSINE = 0.99
"""Every sentence's FP8 embedding must be at least this close to its fp32 embedding."""

_PACKAGES = ("fp8dispatch", "torch", "triton", "transformers", "tokenizers")


class _Record(BaseModel):
    # A cosine that is NaN is a finding: it has to survive the way through the file.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class MachineRecord(_Record):
    """Where the demo ran."""

    system: str
    device: str
    capability: tuple[int, int] | None
    cpu_count: int
    threads: int


class BaselineRecord(_Record):
    """One pass of the model as it was, without FP8."""

    dtype: str
    worst_cosine: float
    mean_cosine: float
    seconds: float


class RecipeRecord(_Record):
    """One recipe: how much smaller, how close, how fast."""

    recipe: str
    backends: tuple[str, ...]
    explanation: str
    converted: int
    skipped: tuple[tuple[str, str], ...]
    bytes_before: int
    bytes_after: int
    worst_cosine: float
    mean_cosine: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every sentence kept its embedding (a NaN does not pass)."""
        return self.worst_cosine >= MIN_COSINE


class LoraRecord(_Record):
    """Two optimiser steps over frozen FP8 weights."""

    recipe: str
    rank: int
    adapted: int
    trained_parameters: int
    losses: tuple[float, float, float]
    only_adapters_got_gradients: bool
    weights_unchanged: bool

    @property
    def passed(self) -> bool:
        """Whether the loss fell at both steps and nothing but the adapters was touched."""
        before, first, second = self.losses
        falls = second < first < before
        return falls and self.only_adapters_got_gradients and self.weights_unchanged


class DemoReport(_Record):
    """The whole result; `schema_version` grows when a field changes its meaning."""

    schema_version: Literal[1] = 1
    machine: MachineRecord
    versions: dict[str, str]
    model: str
    dtype: str
    sentences: int
    tokens: int
    rows_of_x: int
    min_cosine: float = MIN_COSINE
    baselines: tuple[BaselineRecord, ...]
    recipes: tuple[RecipeRecord, ...]
    lora: LoraRecord

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(recipe.passed for recipe in self.recipes) and self.lora.passed


def describe_machine(device: torch.device) -> MachineRecord:
    """The device by its product name, and the processors beside it."""
    cuda = device.type == "cuda"
    return MachineRecord(
        system=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        capability=torch.cuda.get_device_capability(device) if cuda else None,
        cpu_count=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
    )


def installed_versions() -> dict[str, str]:
    """Versions of what computed the result, for the packages that are installed."""
    versions = {"python": platform.python_version()}
    # The running torch knows its build (+cpu, +cu130), which metadata may leave out.
    known = {"torch": torch.__version__}
    for package in _PACKAGES:
        module = sys.modules.get(package)
        version = known.get(package) or getattr(module, "__version__", None)
        if version is None:
            try:
                version = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        versions[package] = str(version)
    return versions
