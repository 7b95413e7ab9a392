"""The machine as plain data: one device and the library versions that decide what can run on it.

Filled by `fp8dispatch.probes`; a test fills it by hand to stand for any GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.version import InvalidVersion, Version


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
    """

    device_type: str
    device_name: str = ""
    capability: tuple[int, int] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    triton_interpreter: bool = False

    def version(self, distribution: str) -> Version | None:
        """The installed version, or None where it is missing or not a PEP 440 version."""
        text = self.versions.get(distribution)
        if text is None:
            return None
        try:
            return Version(text)
        except InvalidVersion:
            return None

    @property
    def is_rocm(self) -> bool:
        """torch is a ROCm build; its GPUs call themselves ``"cuda"`` all the same."""
        return "hip" in self.versions

    def __str__(self) -> str:
        if self.capability is None:
            return self.device_name or self.device_type
        return f"{self.device_name} (capability {self.capability[0]}.{self.capability[1]})"
