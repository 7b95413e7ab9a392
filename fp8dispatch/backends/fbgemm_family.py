"""What FBGEMM's GenAI kernels and MSLK, their successor under another name, have in common.

Both hold the same CUTLASS kernels under the same signatures, in another operator namespace. Read
in their sources (fbgemm_gpu/experimental/gen_ai/src/quantize/cutlass_extensions at v1.6.0) and
wheels, and run on an H200:

* ``f8f8bf16_rowwise(xq, wq, x_scale, w_scale, bias, use_fast_accum)``: contiguous e4m3fn, M and N
  fp32 multipliers (their number is not checked). The product is rounded to the bias's dtype before
  the two are added, so a bf16 bias would be rounded twice: it is handed over in fp32. K a multiple
  of 16, N of 8. Kernels for capability 9.0 and 10.0; any other GPU is given the 9.0 kernel.
* ``f8f8bf16_groupwise(xq, wq, x_scale, w_scale)``: the recipe of 1x128 activation groups and
  128x128 weight blocks. Scales are [K / 128, M] and [K / 128, ceil(N / 128)], both contiguous. It
  checks neither shapes nor strides nor dtypes, and with M not a multiple of 4 the CUDA context is
  lost, so M is padded always and every operand is checked here. Capability 9.0 only: elsewhere
  the kernel prints a line and returns without computing.
* ``f8f8bf16_blockwise`` scales activations in 128x128 tiles. That is another recipe, with other
  numbers; it is never put in the place of 1x128 groups, and is a backend of its own
  (`fbgemm_tile`) that runs only where it is named.

Each release loads with one torch minor and declares none. Importing both libraries into a process
registers some operators twice, so whichever loads second is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.library import (
    GROUP,
    LibraryBackend,
    refuse_block,
    refuse_operands,
)
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.probes.packages import install_hint, paired_torch
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.recipe import Granularity, Recipe

if TYPE_CHECKING:
    import torch

ROWWISE, GROUPWISE = "f8f8bf16_rowwise", "f8f8bf16_groupwise"
_HOPPER = (9, 0)
_BLACKWELL = (10, 0)
M_ALIGN = 4  # x_scale of groupwise is read by bulk copies of 16 bytes along M


class FbgemmFamily(LibraryBackend):
    """FP8 GEMMs of one of the two libraries."""

    capabilities: ClassVar[tuple[tuple[int, int], ...]] = (_HOPPER, _BLACKWELL)
    accuracies = frozenset({Accuracy.EXACT, Accuracy.FAST})
    align_n = 8
    align_k = 16
    matmul = computed_in("fp8dispatch.backends.compute.fbgemm_family")
    _blocks = computed_in("fp8dispatch.backends.compute.fbgemm_family")
    namespace: ClassVar[str]
    """Of the operators: ``torch.ops.<namespace>``."""
    other_namespace: ClassVar[str]
    """Of the library that must not be in the process as well."""
    module: ClassVar[str]
    """Whose import registers the operators."""
    distributions: ClassVar[tuple[str, ...]]
    """Names that carry the kernels; the first is the one to install."""
    lookalikes: ClassVar[Mapping[str, str]] = {}
    """Distributions that only sound right -> why they do not do."""
    first_release: ClassVar[tuple[int, int]]
    block_since: ClassVar[tuple[int, int]]
    """First release whose block kernel is right."""
    blackwell_since: ClassVar[tuple[int, int]]
    """First release whose wheels all hold code for capability 10.0."""
    block_operator: ClassVar[str] = GROUPWISE
    """The operator that the block recipe runs on."""

    def __init__(self) -> None:
        super().__init__()
        self._ops: dict[str, Callable[..., torch.Tensor]] = {}

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return (*self.refuse_installation(machine), *refuse_device(machine, self.capabilities))

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals = refuse_operands(problem, contiguous=True)
        if problem.recipe.granularity is Granularity.BLOCK:
            refusals += refuse_block(problem)
            refusals += refuse_group_columns(problem)
            if machine.capability != _HOPPER:
                need = "capability 9.0 for block scales (elsewhere they return uncomputed)"
                refusals.append(Refusal("capability", need, str(machine)))
            refusals += self.refuse_older(machine, self.block_since, "for right block scales")
        elif machine.capability == _BLACKWELL:
            refusals += self.refuse_older(machine, self.blackwell_since, "for capability 10.0")
        return refusals

    def row_multiple(self, problem: LinearProblem) -> int:
        return M_ALIGN if problem.recipe.granularity is Granularity.BLOCK else 1

    def _load(self) -> tuple[Refusal, ...]:
        from fp8dispatch.backends.compute.operators import cuda_operator, has_operator

        if has_operator(self.other_namespace, ROWWISE):
            return (
                Refusal(
                    "loaded",
                    f"a process without torch.ops.{self.other_namespace} (both libraries "
                    f"register the same operators)",
                    f"torch.ops.{self.other_namespace}.{ROWWISE}",
                ),
            )
        import_module(self.module)
        for name in (ROWWISE, self.block_operator):
            operator = cuda_operator(self.namespace, name)
            if operator is not None:
                self._ops[name] = operator
        return ()

    def _refuse_entry(self, recipe: Recipe) -> tuple[Refusal, ...]:
        name = self.block_operator if recipe.granularity is Granularity.BLOCK else ROWWISE
        if name in self._ops:
            return ()
        need = f"a CUDA kernel of torch.ops.{self.namespace}.{name}"
        return (Refusal("operator", need, f"none after importing {self.module}"),)

    def _installed(self, machine: Machine) -> str | None:
        """The distribution that carries the kernels; PyPI's empty 0.0.0 carries nothing."""
        for name in self.distributions:
            if name in machine.versions and machine.release(name) != (0, 0, 0):
                return name
        return None

    def refuse_installation(self, machine: Machine) -> tuple[Refusal, ...]:
        """The library is not there, or not with the torch that it loads with."""
        torch_text = machine.versions.get("torch", "")
        first = self.distributions[0]
        wanted = f"{first} ({install_hint(first, torch_text)})"
        name = self._installed(machine)
        if name is None:
            for other, reason in self.lookalikes.items():
                if other in machine.versions:
                    found = f"only {other} {machine.versions[other]}, {reason}"
                    return (Refusal("distribution", wanted, found),)
            return (Refusal("version", wanted, "none"),)
        text, release = machine.versions[name], machine.release(name)
        if release is None:
            return (Refusal("version", f"a readable version of {name}", text),)
        if release < self.first_release:
            return (Refusal("version", wanted, f"{name} {text}"),)
        # Nobody has written down which torch a nightly or a later release was built with: loading
        # it tells.
        paired, torch_release = paired_torch(name, text), machine.release("torch")
        if paired is None or torch_release is None:
            return ()
        if paired == f"{torch_release[0]}.{torch_release[1]}":
            return ()
        need = f"torch {paired}, the one that {name} {text} loads with, or {wanted}"
        return (Refusal("torch", need, f"torch {torch_text}"),)

    def refuse_older(
        self, machine: Machine, since: tuple[int, int], why: str
    ) -> tuple[Refusal, ...]:
        """A release before `since`; a nightly's date says nothing, so its numbers must tell."""
        name = self._installed(machine)
        release = None if name is None else machine.release(name)
        if name is None or release is None or release >= since:
            return ()
        need = f"{name} >= {since[0]}.{since[1]} {why}"
        return (Refusal("version", need, f"{name} {machine.versions[name]}"),)


def refuse_device(
    machine: Machine, capabilities: tuple[tuple[int, int], ...]
) -> tuple[Refusal, ...]:
    """A device whose capability is none of these."""
    if machine.is_rocm:
        need = "an NVIDIA GPU (its ROCm builds are other kernels)"
        return (Refusal("rocm", need, f"ROCm on {machine}"),)
    if machine.capability in capabilities:
        return ()
    known = " or ".join(f"{major}.{minor}" for major, minor in capabilities)
    need = f"a CUDA device of capability {known}"
    if machine.is_consumer:
        need += " (consumer chips are given the kernels of 9.0, which do not run there)"
    return (Refusal("capability", need, str(machine)),)


def refuse_group_columns(problem: LinearProblem) -> tuple[Refusal, ...]:
    """A last group of columns that is not whole."""
    if problem.k % GROUP == 0:
        return ()
    need = f"K a multiple of {GROUP} with block scales"
    return (Refusal("align-k", need, f"K={problem.k}"),)
