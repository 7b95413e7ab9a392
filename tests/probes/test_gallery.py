"""Machines as plain data: what a capability and a version say, and the ones to stand in for."""

from __future__ import annotations

import pytest

from fp8dispatch.errors import InvalidInputError
from fp8dispatch.machine import Machine
from fp8dispatch.probes.gallery import CUDA_LIBRARIES, NAMES, simulated
from fp8dispatch.probes.packages import DISTRIBUTIONS, paired_torch

# Name: capability, architecture, instructions of GeForce, GB of memory as sold.
TRUTH = {
    "a100": ((8, 0), "ampere", False, 80),
    "l40s": ((8, 9), "ada", True, 48),
    "rtx-4090": ((8, 9), "ada", True, 24),
    "h100": ((9, 0), "hopper", False, 80),
    "h200": ((9, 0), "hopper", False, 141),
    "b200": ((10, 0), "blackwell", False, 180),
    "b300": ((10, 3), "blackwell", False, 288),
    "rtx-5090": ((12, 0), "blackwell", True, 32),
    "rtx-pro-6000": ((12, 0), "blackwell", True, 96),
    "gb10": ((12, 1), "blackwell", True, 128),
    "mi300x": ((9, 4), "cdna3", False, 192),
    "cpu": (None, "", False, 0),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_gallery(name: str) -> None:
    machine = simulated(name)

    capability, architecture, consumer, memory = TRUTH[name]
    assert machine.capability == capability
    assert machine.architecture == architecture
    assert machine.is_consumer is consumer
    assert machine.memory_bytes / 1e9 == pytest.approx(memory, rel=0.1)
    assert machine.device_type == ("cpu" if name == "cpu" else "cuda")
    assert machine.is_rocm is (name == "mi300x")
    assert machine.version("torch") is not None
    assert set(machine.versions) <= {*DISTRIBUTIONS, "cuda", "hip"}


def test_its_names() -> None:
    assert tuple(TRUTH) == NAMES
    assert simulated("RTX 4090") == simulated("rtx_4090") == simulated("rtx-4090")
    with pytest.raises(InvalidInputError, match=r"must be one of a100, .*, cpu, found 'h300'"):
        simulated("h300")


def test_its_libraries_load_with_its_torch() -> None:
    for distribution in ("fbgemm-gpu-genai", "mslk-cuda"):
        assert paired_torch(distribution, CUDA_LIBRARIES[distribution]) == "2.11"
    assert CUDA_LIBRARIES["torch"].startswith("2.11.")


def test_libraries_to_have_instead() -> None:
    machine = simulated("h100", {"torch": "2.12.0", "torchao": None, "deepgemm": "1.0"})
    assert machine.versions["torch"] == "2.12.0"
    assert machine.versions["deepgemm"] == "1.0"
    assert "torchao" not in machine.versions
    assert "torchao" in simulated("h100").versions


def versioned(text: str) -> Machine:
    return Machine("cuda", versions={"library": text})


@pytest.mark.parametrize(
    ("text", "release", "nightly"),
    [
        ("1.6.0", (1, 6, 0), False),
        ("1.6.0+cu130", (1, 6, 0), False),
        ("1.4", (1, 4, 0), False),
        ("1.9.0rc0", (1, 9, 0), False),
        ("2.12.0.dev20260801+cu130", (2, 12, 0), False),
        ("2.11.0a0+gitabc1234", (2, 11, 0), False),
        ("1.6.0-git0A1b2c3", (1, 6, 0), False),
        ("1.6.0.git0a1b2c3-dirty", (1, 6, 0), False),
        ("2.1.0a0gitf00ba4", (2, 1, 0), False),
        ("2.28.9.1", (2, 28, 9, 1), False),
        ("2026.9.21", (2026, 9, 21), True),
        ("2025.8.20+cu128", (2025, 8, 20), True),
        ("1999.1.1", (1999, 1, 1), False),
        ("INTERNAL", None, False),
        ("", None, False),
        ("1.6.0 or so", None, False),
        ("1.6.0-git", None, False),
    ],
)
def test_versions_as_they_come(text: str, release: tuple[int, ...] | None, nightly: bool) -> None:
    machine = versioned(text)
    assert machine.release("library") == release
    assert machine.is_nightly("library") is nightly
    assert (machine.version("library") is None) is (release is None)


def test_what_is_missing_has_no_version() -> None:
    machine = versioned("1.0")
    assert machine.version("other") is None
    assert machine.release("other") is None
    assert not machine.is_nightly("other")


def test_a_checkout_keeps_its_stage() -> None:
    assert str(versioned("2.1.0a0gitf00ba4").version("library")) == "2.1.0a0+gitf00ba4"
    assert versioned("1.6.0+cu130").release("library") == versioned("1.6.0").release("library")


@pytest.mark.parametrize(
    ("name", "capability", "hip", "architecture", "consumer"),
    [
        ("NVIDIA TITAN V", (7, 0), False, "volta", False),
        ("Tesla T4", (7, 5), False, "turing", True),
        ("NVIDIA L4", (8, 9), False, "ada", True),
        ("Orin", (8, 7), False, "ampere", False),
        ("NVIDIA Thor", (11, 0), False, "blackwell", False),
        ("NVIDIA R100", (13, 0), False, "", False),
        ("NVIDIA GeForce RTX 6090", (13, 1), False, "", True),
        ("NVIDIA GeForce GTX 1080", (6, 1), False, "", True),
        ("AMD Radeon RX 9070", (12, 0), True, "rdna4", True),
        ("AMD Instinct MI250X", (9, 0), True, "", False),
        ("AMD Radeon VII", (9, 0), True, "", True),
        ("AMD Instinct MI350X", (9, 5), True, "cdna4", False),
    ],
)
def test_what_a_chip_is(
    name: str, capability: tuple[int, int], hip: bool, architecture: str, consumer: bool
) -> None:
    machine = Machine("cuda", name, capability, {"hip": "7.0"} if hip else {})
    assert machine.architecture == architecture
    assert machine.is_consumer is consumer


def test_equal_machines_hash_alike() -> None:
    assert simulated("h100") == simulated("h100")
    assert len({simulated("h100"), simulated("h100"), simulated("h200")}) == 2
