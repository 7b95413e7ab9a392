"""Packages as their metadata tells of them: hand-made dist-info folders, some of them broken."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from fp8dispatch.probes import packages
from fp8dispatch.probes.packages import (
    DISTRIBUTIONS,
    install_hint,
    installed_versions,
    package_report,
    paired_torch,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INDEX = "--index-url https://download.pytorch.org/whl"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for packages that is the only one."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    _forget()
    yield folder
    _forget()


def _forget() -> None:
    package_report.cache_clear()
    installed_versions.cache_clear()


def install(site: Path, folder: str, text: str | bytes | None) -> Path:
    """Make ``<folder>.dist-info`` with this METADATA; with none at all for None."""
    place = site / f"{folder}.dist-info"
    place.mkdir()
    if isinstance(text, str):
        text = text.encode()
    if text is not None:
        (place / "METADATA").write_bytes(text)
    return place


def stated(name: str, version: str) -> str:
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nA text.\nVersion: 0\n"


@pytest.mark.parametrize(
    ("folder", "name", "version", "found"),
    [
        ("fbgemm_gpu_genai-1.6.0", "fbgemm_gpu_genai", "1.6.0", "fbgemm-gpu-genai"),
        ("fbgemm_gpu_genai-1.6.0+cu130", "fbgemm_gpu_genai", "1.6.0+cu130", "fbgemm-gpu-genai"),
        ("fbgemm_gpu_genai-1.2.0", "fbgemm_gpu-genai", "1.2.0", "fbgemm-gpu-genai"),
        ("fbgemm_gpu-genai-1.2.0", "fbgemm_gpu-genai", "1.2.0", "fbgemm-gpu-genai"),
        (
            "fbgemm_gpu_genai_nightly-2026.9.21",
            "fbgemm_gpu_genai_nightly",
            "2026.9.21",
            "fbgemm-gpu-genai-nightly",
        ),
        ("MSLK.cuda-1.1.0", "MSLK.cuda", "1.1.0", "mslk-cuda"),
        ("torchao-0.18.0", "torchao", "0.18.0", "torchao"),
        ("fbgemm_gpu-1.0.dev0", "fbgemm_gpu", "INTERNAL", "fbgemm-gpu"),
    ],
)
def test_names_as_pep_503_reads_them(
    site: Path, folder: str, name: str, version: str, found: str
) -> None:
    install(site, folder, stated(name, version))
    assert package_report().versions == {found: version}
    assert package_report().problems == ()


def test_what_nobody_asks_for_is_not_listed(site: Path) -> None:
    install(site, "numpy-2.0.0", stated("numpy", "2.0.0"))
    assert installed_versions() == {}


@pytest.mark.parametrize(
    "carrier", ["pytorch-triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm"]
)
def test_who_brings_triton_is_found_as_triton(site: Path, carrier: str) -> None:
    install(site, f"{carrier.replace('-', '_')}-3.4.0", stated(carrier, "3.4.0"))
    assert installed_versions() == {carrier: "3.4.0", "triton": "3.4.0"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "without a version"),
        ("", "without a version"),
        ("Metadata-Version: 2.1\nName: torchao\n\n", "without a version"),
        ("Metadata-Version: 2.1\nName: torchao\nVersion:\n\n", "without a version"),
        (b"Metadata-Version: 2.1\nName: torchao\nVersion: \xff\xfe\n\n", "cannot be read"),
    ],
)
def test_broken_metadata_is_reported_and_harms_nothing_else(
    site: Path, text: str | bytes | None, words: str
) -> None:
    install(site, "torchao-0.18.0", text)
    install(site, "torch-2.11.0", stated("torch", "2.11.0"))

    report = package_report()

    assert report.versions == {"torch": "2.11.0"}
    (problem,) = report.problems
    assert problem.startswith(f"torchao in {os.path.realpath(site)} has metadata")
    assert words in problem
    assert "install it again" in problem


def test_metadata_without_a_name_has_that_of_its_folder(site: Path) -> None:
    install(site, "torchao-0.18.0", "Metadata-Version: 2.1\nVersion: 0.18.0\n\n")
    assert installed_versions() == {"torchao": "0.18.0"}


def test_two_in_one_folder(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "lib64"  # as virtual environments have it: the same folder once more
    link.symlink_to(site)
    monkeypatch.setattr(sys, "path", [str(site), str(link)])
    for version in ("1.10.0", "1.9.0", "INTERNAL"):
        install(site, f"fbgemm_gpu_genai-{version}", stated("fbgemm_gpu_genai", version))

    report = package_report()

    assert report.versions == {"fbgemm-gpu-genai": "1.10.0"}
    (problem,) = report.problems
    assert "installed 3 times" in problem
    assert "INTERNAL, 1.9.0, 1.10.0" in problem


def test_the_first_on_the_path_hides_the_next(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    link = tmp_path / "link"
    link.symlink_to(site)
    monkeypatch.setattr(sys, "path", [str(site), str(link), str(site), str(other)])
    install(site, "torch-2.11.0", stated("torch", "2.11.0"))
    install(other, "torch-2.12.0", stated("torch", "2.12.0"))
    install(site, "torchao-0.18.0", stated("torchao", "0.18.0"))
    install(other, "torchao-0.18.0", stated("torchao", "0.18.0"))

    report = package_report()

    assert report.versions == {"torch": "2.11.0", "torchao": "0.18.0"}
    (problem,) = report.problems
    assert "torch 2.11.0" in problem
    assert "hides torch 2.12.0" in problem


@pytest.mark.parametrize(
    ("distribution", "version", "torch"),
    [
        ("fbgemm-gpu-genai", "1.6.0", "2.11"),
        ("fbgemm_gpu_genai", "1.6.0+cu130", "2.11"),
        ("FBGEMM.GPU", "1.5", "2.10"),
        ("fbgemm-gpu-genai", "1.9.0rc0", "2.14"),
        ("fbgemm-gpu-genai", "1.4.2", "2.9"),
        ("mslk-cuda", "1.1.0", "2.11"),
        ("mslk", "1.3.0+cu130", "2.13"),
        ("mslk", "0.0.0", None),
        ("fbgemm-gpu-genai", "2026.9.21", None),
        ("fbgemm-gpu-genai", "1.10.0", None),
        ("fbgemm-gpu-genai", "INTERNAL", None),
        ("torchao", "0.18.0", None),
    ],
)
def test_the_torch_that_a_release_needs(distribution: str, version: str, torch: str | None) -> None:
    assert paired_torch(distribution, version) == torch


@pytest.mark.parametrize(
    ("distribution", "torch", "line"),
    [
        ("fbgemm-gpu-genai", "2.11.0", "pip install fbgemm-gpu-genai==1.6.0"),
        ("fbgemm_gpu", "2.11.0+cu130", "pip install fbgemm-gpu-genai==1.6.0"),
        ("fbgemm-gpu-genai", "2.10.1", "pip install fbgemm-gpu-genai==1.5.0"),
        ("fbgemm-gpu-genai", "2.14.0+cu132", "pip install fbgemm-gpu-genai==1.9.0"),
        # PyPI's wheel is linked with CUDA 13, this torch with 12.
        (
            "fbgemm-gpu-genai",
            "2.11.0+cu128",
            f"pip install fbgemm-gpu-genai==1.6.0 {INDEX}/cu128",
        ),
        ("mslk", "2.11.0", "pip install mslk-cuda==1.1.0"),
        ("mslk-cuda", "2.10.0+cu130", f"pip install mslk==1.0.0 {INDEX}/cu130"),
        ("mslk-cuda", "2.13.0", f"pip install 'mslk==1.3.*' {INDEX}/cu130"),
        (
            "fbgemm-gpu-genai",
            "2.13.0+cpu",
            "fbgemm-gpu-genai needs a CUDA build of torch, found torch 2.13.0+cpu",
        ),
        (
            "mslk",
            "2.11.0+rocm7.2",
            "mslk-cuda needs a CUDA build of torch, found torch 2.11.0+rocm7.2",
        ),
        (
            "fbgemm-gpu-genai",
            "2.15.0",
            "no release of fbgemm-gpu-genai is known to load with torch 2.15.0",
        ),
        (
            "fbgemm-gpu-genai",
            "2.12.0.dev20260501+cu130",
            "no release of fbgemm-gpu-genai is known to load with torch 2.12.0.dev20260501+cu130",
        ),
        (
            "fbgemm-gpu-genai",
            "2.11.0a0+abc.nv26.1",
            "no release of fbgemm-gpu-genai is known to load with torch 2.11.0a0+abc.nv26.1",
        ),
        (
            "torchao",
            "",
            "install torch first: what fits of torchao depends on its version, found none",
        ),
        ("torchao", "2.10.0", "pip install torchao==0.16.0"),
        ("torchao-nightly", "2.13.0+cpu", "pip install torchao==0.18.0"),
        ("deep-gemm", "2.11.0", "pip install sgl-deep-gemm==0.1.5.post1"),
        ("sgl-deep-gemm", "2.12.0", "pip install sgl-deep-gemm"),
        ("nvidia-ml-py", "", "pip install nvidia-ml-py"),
        (
            "pytorch-triton",
            "2.11.0",
            "CUDA builds of torch bring triton; with a CPU build: "
            "pip install 'fp8dispatch[triton]'",
        ),
    ],
)
def test_the_line_that_fits_this_torch(distribution: str, torch: str, line: str) -> None:
    assert install_hint(distribution, torch) == line


def test_every_line_installs_what_is_paired() -> None:
    for distribution, releases in packages._PYPI.items():
        for torch, (release, _) in releases.items():
            assert paired_torch(distribution, release) == torch
            assert (
                install_hint(distribution, f"{torch}.0") == f"pip install {distribution}=={release}"
            )


def test_every_distribution_is_spelled_as_it_is_looked_up() -> None:
    assert all(packages.canonicalize_name(name) == name for name in DISTRIBUTIONS)
    assert len(set(DISTRIBUTIONS)) == len(DISTRIBUTIONS)
    for name in DISTRIBUTIONS:
        assert install_hint(name, "2.11.0")
