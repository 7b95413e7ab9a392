"""Backends that other packages offer: found, loaded on demand, harmless when broken."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fp8dispatch import policy, registry
from fp8dispatch.backends.eager import Eager
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.linear import explain, fp8_linear
from fp8dispatch.quantization.weight import quantize


class Good(Eager):
    """A backend as another package would offer it, known to run on a CPU."""

    name = "goodone"
    verified_capabilities = (None,)  # type: ignore[assignment]  # what a CPU has for a capability


GOOD = Good()


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registry as it is when a package offers four backends, two of them broken."""
    entries = metadata.EntryPoints(
        metadata.EntryPoint(name, value, registry.ENTRY_POINTS)
        for name, value in {
            "goodone": "tests.test_registry:GOOD",
            "missing": "no_such_module:BACKEND",
            "nonsense": "tests.test_registry:__doc__",
            "triton": "tests.test_registry:GOOD",
        }.items()
    )
    found = metadata.entry_points

    def entry_points(**asked: str) -> metadata.EntryPoints:
        return entries if asked == {"group": registry.ENTRY_POINTS} else found(**asked)

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    importlib.reload(registry)
    yield
    monkeypatch.undo()
    importlib.reload(registry)


@pytest.mark.usefixtures("plugins")
def test_plugins_come_after_ours_and_before_eager() -> None:
    assert registry.NAMES[-4:] == ("goodone", "missing", "nonsense", "eager")
    assert registry.load("goodone") is GOOD


@pytest.mark.usefixtures("plugins")
def test_a_plugin_cannot_take_one_of_our_names(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fp8dispatch"):
        importlib.reload(registry)
    assert "'triton'" in caplog.text
    assert type(registry.load("triton")).__module__ == "fp8dispatch.backends.triton"


@pytest.mark.usefixtures("plugins")
def test_a_broken_plugin_refuses_with_its_error_and_harms_nothing() -> None:
    weight, scale = quantize(torch.randn(32, 64))
    x = torch.randn(2, 64)
    refused = dict(explain(x, weight, scale).refusals)

    assert fp8_linear(x, weight, scale).shape == (2, 32)
    assert "No module named 'no_such_module'" in str(refused["missing"][0])
    assert "not a Backend" in str(refused["nonsense"][0])
    with pytest.raises(BackendUnavailableError, match="no_such_module"):
        fp8_linear(x, weight, scale, backend="missing")


@pytest.mark.usefixtures("plugins")
def test_a_plugin_runs_when_it_is_asked_for() -> None:
    weight, scale = quantize(torch.randn(32, 64))
    x = torch.randn(2, 64)

    assert torch.equal(
        fp8_linear(x, weight, scale, backend="goodone"),
        fp8_linear(x, weight, scale, backend="eager"),
    )


def test_a_plugin_has_the_version_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "acme_fp8-2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-fp8\nVersion: 2.3\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\nacme = acme:BACKEND\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.reload(registry)
        assert registry.plugin_version("acme") == "2.3"
        assert registry.plugin_version("triton") is None
    finally:
        monkeypatch.undo()
        importlib.reload(registry)


@pytest.mark.usefixtures("plugins")
def test_plugins_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(policy.PLUGINS_VARIABLE, "0")
    importlib.reload(registry)
    assert "goodone" not in registry.NAMES
