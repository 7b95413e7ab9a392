"""Which of the libraries that matter are installed, read from package metadata alone.

None of them is imported: importing FBGEMM or TorchAO loads hundreds of megabytes, may start CUDA,
and fails outright beside the wrong torch. Broken metadata is reported and harms nothing else.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata

from packaging.utils import canonicalize_name
from packaging.version import Version

from fp8dispatch.machine import parse_version

DISTRIBUTIONS = (
    "torch",
    # Who brings the module triton.
    "triton",
    "pytorch-triton",
    "pytorch-triton-rocm",
    "triton-rocm",
    "triton-windows",
    # FBGEMM: the FP8 GEMMs are in the genai ones. Nightlies from PyPI have names of their own,
    # those from the PyTorch index have the name of the release and a date for a version.
    "fbgemm-gpu",
    "fbgemm-gpu-nightly",
    "fbgemm-gpu-genai",
    "fbgemm-gpu-genai-nightly",
    "fbgemm-gpu-nightly-genai",
    # Its successor: `mslk` on the PyTorch index, `mslk-cuda` on PyPI.
    "mslk",
    "mslk-cuda",
    "mslk-cuda-nightly",
    "torchao",
    "torchao-nightly",
    # DeepGEMM: only the first holds kernels; `deep-gemm` is also what its own setup.py installs.
    "sgl-deep-gemm",
    "deep-gemm",
    "deepgemm",
    "transformers",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
    "nvidia-cublas-cu13",
    "nvidia-ml-py",
)
"""The distributions that are looked for, in the spelling of PEP 503."""

_TRITON_CARRIERS = ("pytorch-triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm")

# The one torch that each release loads with, by minor releases. From FBGEMM's own check
# (`_fbgemm_torch_compat_table` in fbgemm_gpu/__init__.py; 1.9: the copy in its wheel) and from the
# table in MSLK's README. No wheel declares it, so pip pairs them wrongly without a word.
_FBGEMM_TORCH = {
    "1.2": "2.7",
    "1.3": "2.8",
    "1.4": "2.9",
    "1.5": "2.10",
    "1.6": "2.11",
    "1.7": "2.12",
    "1.8": "2.13",
    "1.9": "2.14",
}
_MSLK_TORCH = {"1.0": "2.10", "1.1": "2.11", "1.2": "2.12", "1.3": "2.13"}
_PAIRS = {
    "fbgemm-gpu": _FBGEMM_TORCH,
    "fbgemm-gpu-genai": _FBGEMM_TORCH,
    "mslk": _MSLK_TORCH,
    "mslk-cuda": _MSLK_TORCH,
}

# What PyPI holds for a torch minor: the newest release and the CUDA major that its wheel is linked
# with (NEEDED libcudart.so.N). MSLK has stopped at 1.1.0 there.
_PYPI = {
    "fbgemm-gpu-genai": {
        "2.7": ("1.2.0", "12"),
        "2.8": ("1.3.0", "12"),
        "2.9": ("1.4.2", "12"),
        "2.10": ("1.5.0", "12"),
        "2.11": ("1.6.0", "13"),
        "2.12": ("1.7.0", "13"),
        "2.13": ("1.8.0", "13"),
        "2.14": ("1.9.0", "13"),
    },
    "mslk-cuda": {"2.10": ("1.0.0", "12"), "2.11": ("1.1.0", "13")},
}
_PYTORCH_INDEX = "https://download.pytorch.org/whl"
_USUAL_CUDA = "cu130"
"""The CUDA of torch's own wheels on PyPI from 2.11 on, which their version does not say."""

_TORCHAO_FOR_TORCH_2_10 = "torchao==0.16.0"
_TORCHAO = "torchao==0.18.0"  # 0.17 and 0.18 take any torch from 2.11 on
# Later releases are linked against symbols that torch 2.11 does not have.
_DEEPGEMM_FOR_TORCH_2_11 = "sgl-deep-gemm==0.1.5.post1"

# The distribution to install where another one of the same library is asked about.
_INSTALLS = {
    "fbgemm-gpu": "fbgemm-gpu-genai",
    "fbgemm-gpu-nightly": "fbgemm-gpu-genai",
    "fbgemm-gpu-genai-nightly": "fbgemm-gpu-genai",
    "fbgemm-gpu-nightly-genai": "fbgemm-gpu-genai",
    "mslk": "mslk-cuda",
    "mslk-cuda-nightly": "mslk-cuda",
    "torchao-nightly": "torchao",
    "deep-gemm": "sgl-deep-gemm",
    "deepgemm": "sgl-deep-gemm",
}


@dataclass(frozen=True)
class PackageReport:
    """What is installed.

    Attributes:
        versions: distribution name -> version text as its metadata states it.
        problems: one sentence for each distribution whose metadata is broken or ambiguous.
    """

    versions: dict[str, str]
    problems: tuple[str, ...] = ()


@functools.cache
def installed_versions() -> dict[str, str]:
    """Distribution name -> version text, for those of `DISTRIBUTIONS` that are installed.

    Whoever brings the module triton is found under ``"triton"`` as well.
    """
    return package_report().versions


@functools.cache
def package_report() -> PackageReport:
    """Read the metadata of every distribution in `DISTRIBUTIONS`, along ``sys.path``."""
    found: dict[str, list[_Found]] = defaultdict(list)
    problems: list[str] = []
    seen: set[tuple[str, str, str]] = set()
    for asked in DISTRIBUTIONS:
        for distribution in metadata.distributions(name=asked):
            entry = _read(asked, distribution, problems)
            if entry is None or (entry.name, entry.version, entry.folder) in seen:
                continue  # one folder, twice on sys.path
            seen.add((entry.name, entry.version, entry.folder))
            if entry.name in DISTRIBUTIONS:
                found[entry.name].append(entry)
    versions = {
        name: _choose(name, found[name], problems) for name in DISTRIBUTIONS if name in found
    }
    for carrier in _TRITON_CARRIERS:
        if carrier in versions:
            versions.setdefault("triton", versions[carrier])
    return PackageReport(versions, tuple(dict.fromkeys(problems)))


@dataclass(frozen=True)
class _Found:
    name: str
    version: str
    folder: str


def _read(asked: str, distribution: metadata.Distribution, problems: list[str]) -> _Found | None:
    """Name, version and place of one distribution; None, and a problem, if it states none."""
    folder = os.path.realpath(str(distribution.locate_file("")))
    try:
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(
            f"{asked} in {folder} has metadata that cannot be read ({error}), so it counts as "
            f"not installed: install it again"
        )
        return None
    # The library's own `.version` would warn or raise where a header is missing.
    headers = HeaderParser().parsestr(text or "")
    version = (headers.get("Version") or "").strip()
    if not version:
        problems.append(
            f"{asked} in {folder} has metadata without a version, so it counts as not installed: "
            f"install it again"
        )
        return None
    return _Found(canonicalize_name((headers.get("Name") or asked).strip()), version, folder)


def _choose(name: str, entries: list[_Found], problems: list[str]) -> str:
    """The version of what an import would load: the first on ``sys.path``.

    Two in one folder are what an interrupted upgrade leaves, and their order is the file system's:
    the newest then stands for them.
    """
    first = [entry for entry in entries if entry.folder == entries[0].folder]
    first.sort(key=lambda entry: (parse_version(entry.version) or Version("0"), entry.version))
    chosen = first[-1]
    if len(first) > 1:
        listed = ", ".join(entry.version for entry in first)
        problems.append(
            f"{name} is installed {len(first)} times in {chosen.folder} ({listed}), of which "
            f"{chosen.version} is taken for the true one: uninstall it until it is gone, then "
            f"install it again"
        )
    for hidden in entries:
        if hidden.folder != chosen.folder and hidden.version != chosen.version:
            problems.append(
                f"{name} {chosen.version} in {chosen.folder} hides {name} {hidden.version} in "
                f"{hidden.folder}"
            )
    return chosen.version


def paired_torch(distribution: str, version: str) -> str | None:
    """The minor release of torch that a release of FBGEMM or MSLK loads with, such as ``"2.11"``.

    None where no table says it: other distributions, nightlies, releases newer than the table.
    """
    release = parse_version(version)
    if release is None:
        return None
    return _PAIRS.get(canonicalize_name(distribution), {}).get(f"{release.major}.{release.minor}")


def install_hint(distribution: str, torch_version: str) -> str:
    """The line that installs what fits this torch, or a sentence about why there is none.

    Args:
        distribution: any of `DISTRIBUTIONS`; where another one holds the kernels, the line
            installs that one.
        torch_version: of the torch that is installed, with its local suffix if it is known.
    """
    name = canonicalize_name(distribution)
    wanted = _INSTALLS.get(name, name)
    if wanted == "triton" or wanted in _TRITON_CARRIERS:
        return (
            "CUDA builds of torch bring triton; with a CPU build: pip install 'fp8dispatch[triton]'"
        )
    if wanted not in ("torchao", "sgl-deep-gemm", *_PYPI):
        return f"pip install {wanted}"
    torch = parse_version(torch_version)
    if torch is None:
        found = repr(torch_version) if torch_version else "none"
        return f"install torch first: what fits of {wanted} depends on its version, found {found}"
    if wanted == "sgl-deep-gemm":
        fits = torch.release[:2] == (2, 11)
        return f"pip install {_DEEPGEMM_FOR_TORCH_2_11 if fits else wanted}"
    if wanted == "torchao":
        release = _TORCHAO if torch.release >= (2, 11) else _TORCHAO_FOR_TORCH_2_10
        return f"pip install {release}"
    return _paired_hint(wanted, torch)


def _paired_hint(wanted: str, torch: Version) -> str:
    """The line for a library whose every release loads with one torch and one CUDA."""
    build = torch.local or ""
    if build.startswith(("cpu", "rocm", "xpu")):
        return f"{wanted} needs a CUDA build of torch, found torch {torch}"
    minor = f"{torch.major}.{torch.minor}"
    releases = {needed: release for release, needed in _PAIRS[wanted].items()}
    if minor not in releases or torch.is_prerelease:
        return f"no release of {wanted} is known to load with torch {torch}"
    version, cuda = _PYPI[wanted].get(minor, ("", ""))
    index = build if build.startswith("cu") else _USUAL_CUDA
    if version and (not build.startswith("cu") or index[2:4] == cuda):
        return f"pip install {wanted}=={version}"
    name = "mslk" if wanted == "mslk-cuda" else wanted
    pin = f"{name}=={version}" if version else f"'{name}=={releases[minor]}.*'"
    return f"pip install {pin} --index-url {_PYTORCH_INDEX}/{index}"
