"""The machine as plain data: one device and the library versions that decide what can run on it.

Filled by `fp8dispatch.probes`; a test fills it by hand to stand for any GPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.version import InvalidVersion, Version

# NVIDIA's own table (https://developer.nvidia.com/cuda-gpus) and, for chips without a card, nvcc's
# list of targets. 11.0 is the chip that CUDA before 13.0 calls 10.1.
_NVIDIA_ARCHITECTURES = {
    (7, 0): "volta",
    (7, 2): "volta",
    (7, 5): "turing",
    (8, 0): "ampere",
    (8, 6): "ampere",
    (8, 7): "ampere",
    (8, 8): "ampere",
    (8, 9): "ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (10, 1): "blackwell",
    (10, 3): "blackwell",
    (11, 0): "blackwell",
    (12, 0): "blackwell",
    (12, 1): "blackwell",
}
# ROCm builds of torch put the gfx number where the capability is: gfx942 is (9, 4).
_AMD_ARCHITECTURES = {(9, 4): "cdna3", (9, 5): "cdna4", (12, 0): "rdna4"}

_CONSUMER_CAPABILITIES = frozenset({(7, 5), (8, 6), (8, 9), (12, 0), (12, 1)})
_CONSUMER_NAME = re.compile(r"\b(GeForce|Quadro|Radeon|RTX|TITAN)\b", re.IGNORECASE)

# A build from a checkout: "1.6.0-git0a1b2c3", "1.6.0.git0a1b2c3-dirty", "2.1.0a0gitf00".
_CHECKOUT = re.compile(
    r"\s*v?(?P<version>\d+(?:\.\d+)*(?:(?:a|b|rc|\.?dev|\.?post)\d+)?)"
    r"[-._+]?g(?:it)?[-.]?(?P<commit>[0-9a-f]{3,40})(?:[-.+]dirty)?\s*",
    re.IGNORECASE,
)

_FIRST_YEAR = 2000
"""A release that starts with this or more is a date: a nightly build, not a version."""


@functools.lru_cache(maxsize=256)
def parse_version(text: str) -> Version | None:
    """A version as PEP 440 reads it, also with a commit glued on; None for anything else."""
    try:
        return Version(text)
    except InvalidVersion:
        checkout = _CHECKOUT.fullmatch(text)
    return checkout and Version(f"{checkout['version']}+git{checkout['commit'].lower()}")


@dataclass(frozen=True)
class Machine:
    """One device and what is installed.

    Attributes:
        device_type: ``"cuda"``, ``"cpu"``, ``"mps"`` ... as torch names it.
        device_name: marketing name, for sentences.
        capability: CUDA compute capability, None where there is none.
        versions: distribution name -> version text, only of what is installed; ``"cuda"`` and
            ``"hip"`` are the versions that torch was built with.
        triton_interpreter: Triton kernels run in Triton's interpreter, on CPU tensors.
        driver: version of the GPU's driver, ``""`` where nobody could say.
        memory_bytes: memory of the device, 0 where nobody could say.
        mig: the device is a slice of a GPU (MIG), with a part of its SMs and memory.
        uuid: which device it is, as NVML writes it (``"GPU-..."``, ``"MIG-..."``).
    """

    device_type: str
    device_name: str = ""
    capability: tuple[int, int] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    triton_interpreter: bool = False
    driver: str = ""
    memory_bytes: int = 0
    mig: bool = False
    uuid: str = ""

    def __hash__(self) -> int:
        """Equal machines hash alike, though their mappings of versions cannot be hashed."""
        device = (self.device_type, self.device_name, self.capability, self.uuid, self.driver)
        return hash((device, frozenset(self.versions.items())))

    def version(self, distribution: str) -> Version | None:
        """The installed version, or None where it is missing or cannot be read as a version."""
        text = self.versions.get(distribution)
        return None if text is None else parse_version(text)

    def release(self, distribution: str) -> tuple[int, ...] | None:
        """The numbers of the installed version: (1, 6, 0) for ``"1.6.0rc1+cu130"``.

        Always three numbers or more, so that ``"1.4"`` is not less than (1, 4, 0). For a nightly
        it is a date, later than every release: ask `is_nightly` first.
        """
        found = self.version(distribution)
        if found is None:
            return None
        return found.release + (0,) * (3 - len(found.release))

    def is_nightly(self, distribution: str) -> bool:
        """The installed build is dated ("2026.9.21"), so its version says nothing of its age.

        ``"2.12.0.dev20260801"`` is not: its numbers name the release that it comes before.
        """
        found = self.version(distribution)
        return found is not None and found.release[0] >= _FIRST_YEAR

    @property
    def is_rocm(self) -> bool:
        """torch is a ROCm build; its GPUs call themselves ``"cuda"`` all the same."""
        return "hip" in self.versions

    @property
    def architecture(self) -> str:
        """``"ampere"``, ``"ada"``, ``"hopper"``, ``"blackwell"`` ...; ``""`` for a chip unknown.

        The family alone: Blackwell's 10.x and 12.x have different instructions.
        """
        if self.capability is None:
            return ""
        table = _AMD_ARCHITECTURES if self.is_rocm else _NVIDIA_ARCHITECTURES
        return table.get(self.capability, "")

    @property
    def is_consumer(self) -> bool:
        """The chip has the instructions of GeForce, whatever the card costs.

        What libraries compile for "datacentre" GPUs cannot run on it: no warp-group MMA (9.0),
        no tensor memory (10.x), about 100 KB of shared memory a block. So the capability decides,
        and L4, L40S, RTX PRO 6000 Server and GB10 are consumer chips here, while TITAN V (7.0)
        is not. The name decides only where the capability is unknown, or is AMD's.
        """
        if self.capability in _NVIDIA_ARCHITECTURES and not self.is_rocm:
            return self.capability in _CONSUMER_CAPABILITIES
        return _CONSUMER_NAME.search(self.device_name) is not None

    def __str__(self) -> str:
        if self.capability is None:
            return self.device_name or self.device_type
        return f"{self.device_name} (capability {self.capability[0]}.{self.capability[1]})"
