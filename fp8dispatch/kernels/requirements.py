"""What the Triton kernels need of a machine, as plain data; imports no Triton."""

from __future__ import annotations

from packaging.version import Version

from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine

MINIMUM_TRITON = "3.4"
"""First release with host-side tensor descriptors."""

CAPABILITIES = (
    (8, 0),
    (8, 6),
    (8, 7),
    (8, 9),
    (9, 0),
    (10, 0),
    (10, 3),
    (12, 0),
    (12, 1),
)
"""Run on 9.0; the others are compiled in the tests, or share their instructions with one that is.

Below 8.9 the GPU has no FP8: the kernels then decode the bytes and multiply in fp16, exactly.
"""


def refuse_machine(machine: Machine) -> tuple[Refusal, ...]:
    """Why the kernels cannot run on this machine; empty when they can."""
    found = machine.version("triton")
    if found is None or found.release < Version(MINIMUM_TRITON).release:
        return (
            Refusal(
                "version",
                f"triton >= {MINIMUM_TRITON} (CUDA builds of torch bring it; elsewhere: "
                f"pip install 'fp8dispatch[triton]')",
                machine.versions.get("triton", "none"),
            ),
        )
    if machine.triton_interpreter:
        return ()
    if machine.is_rocm:
        return (Refusal("rocm", "an NVIDIA GPU (not verified on ROCm)", str(machine)),)
    if machine.capability not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        return (Refusal("capability", f"a CUDA device of capability {known}", str(machine)),)
    return ()


GLUON_TRITON = ("3.6", "3.9")
"""First and last minor release that the Gluon kernels are compiled for; 3.6 is what they run on."""

GLUON_CAPABILITY = (9, 0)
"""Hopper: its warp-group instructions exist on no other GPU."""


def refuse_gluon(machine: Machine) -> tuple[Refusal, ...]:
    """Why the kernels written in Gluon, Triton's lower level, cannot run on this machine."""
    refusals: list[Refusal] = []
    first, last = (Version(text).release[:2] for text in GLUON_TRITON)
    release = machine.release("triton")
    if release is None or not first <= release[:2] <= last or machine.is_nightly("triton"):
        need = f"triton {GLUON_TRITON[0]} to {GLUON_TRITON[1]} (Gluon changes with each release)"
        refusals.append(Refusal("version", need, machine.versions.get("triton", "none")))
    if machine.triton_interpreter:
        need = "a GPU (Triton's interpreter knows no Gluon)"
        refusals.append(Refusal("interpreter", need, "TRITON_INTERPRET"))
    if machine.is_rocm or machine.capability != GLUON_CAPABILITY:
        found = f"ROCm on {machine}" if machine.is_rocm else str(machine)
        refusals.append(Refusal("capability", "a CUDA device of capability 9.0", found))
    return tuple(refusals)
