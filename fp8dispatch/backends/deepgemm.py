"""DeepGEMM's block GEMM on Hopper: 1x128 activation groups, 128x128 weight blocks, bf16 output.

From the distribution ``sgl-deep-gemm``; ``deep-gemm`` on PyPI is an empty placeholder. Read in
DeepGEMM's sources (csrc/apis/gemm.hpp, layout.hpp, smxx_layout.hpp), run on an H200 with
``sgl-deep-gemm`` 0.1.5.post1 and torch 2.11:

* ``fp8_gemm_nt((a, sa), (b, sb), out, disable_ue8m0_cast=True)``. `sb` is row-major. `sa` is
  [M, groups] with strides (1, round_up(M, 4)): then it is taken as it lies, anything else is
  transposed by another kernel first. Our quantiser writes just that where it pads M to 4.
* Bulk copies move every operand, so rows are multiples of 16 bytes: K of 16, N of 8. K and N may
  be ragged otherwise. No bias: accumulating into the output is in bf16 on Hopper.
* On capability 10.0 it wants scales that are powers of two (UE8M0); others would be rounded up
  without requantising, which is finite and wrong (huggingface/transformers#47030). Refused.
* Each new kernel is compiled with nvcc from the CUDA toolkit (seconds), then kept on disk; which
  kernel a call takes depends on M too.
* Releases after 0.1.5.post1 are linked against symbols that torch 2.11 does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from packaging.version import Version

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.library import (
    LibraryBackend,
    Warmed,
    refuse_block,
    refuse_operands,
)
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.policy import cuda_compiler
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import Granularity

_DISTRIBUTION = "sgl-deep-gemm"
_LOOKALIKES = ("deep-gemm", "deepgemm")
_LAST_FOR_TORCH_2_11 = Version("0.1.5.post1")
M_ALIGN = 4  # scales are fp32 and M-major: 16 bytes per group


class DeepGemm(LibraryBackend):
    """``fp8_gemm_nt`` of DeepGEMM as SGLang packages it."""

    name = "deepgemm"
    capabilities = ((9, 0),)
    verified_capabilities: ClassVar[tuple[tuple[int, int], ...]] = ((9, 0),)
    verified_versions: ClassVar[Mapping[str, tuple[str, ...]]] = {_DISTRIBUTION: ("0.1.5.post1",)}
    recipes = frozenset({Granularity.BLOCK})
    align_n = 8
    align_k = 16
    distributions = (_DISTRIBUTION,)
    needs_to_load = "deep_gemm to import, with a CUDA toolkit for its compiler (CUDA_HOME)"
    matmul = computed_in("fp8dispatch.backends.compute.deepgemm")

    def __init__(self) -> None:
        super().__init__()
        self._gemm: Callable[..., None] | None = None
        self._warmed = Warmed(self.name, "may compile a kernel")

    def toolchain(self) -> Mapping[str, str]:
        compiler = cuda_compiler()
        try:
            kind = compiler.resolve(strict=True).stat()
        except (OSError, RuntimeError):  # absent, unreadable, or a circle of links
            return {"nvcc": f"none at {compiler}"}
        # Asking it for its version would start a process; another release is another file.
        return {"nvcc": f"{compiler.resolve()}, {kind.st_size} bytes of {int(kind.st_mtime)}"}

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        return (*_refuse_installation(machine), *super().refuse_machine(machine))

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        return refuse_operands(problem) + refuse_block(problem)

    def row_multiple(self, problem: LinearProblem) -> int:
        return M_ALIGN

    def _load(self) -> tuple[Refusal, ...]:
        library = import_module("deep_gemm")
        home = Path(library.find_cuda_home())
        if not (home / "bin" / "nvcc").is_file():
            need = "the CUDA compiler nvcc for its kernels (install the toolkit, set CUDA_HOME)"
            return (Refusal("compiler", need, f"no bin/nvcc in {home}"),)
        self._gemm = library.fp8_gemm_nt
        return ()


def _refuse_installation(machine: Machine) -> tuple[Refusal, ...]:
    text = machine.versions.get(_DISTRIBUTION)
    if text is None:
        other = next((name for name in _LOOKALIKES if name in machine.versions), None)
        line = f"pip install '{_DISTRIBUTION}=={_LAST_FOR_TORCH_2_11}'"
        need = f"{_DISTRIBUTION} ({line} fits torch 2.11)"
        if other is None:
            return (Refusal("version", need, "none"),)
        found = f"only {other} {machine.versions[other]}, on PyPI an empty placeholder"
        return (Refusal("distribution", need, found),)
    version, torch_version = machine.version(_DISTRIBUTION), machine.version("torch")
    if version is None:
        return (Refusal("version", f"a readable version of {_DISTRIBUTION}", text),)
    too_new = Version(version.public) > _LAST_FOR_TORCH_2_11
    if too_new and torch_version is not None and torch_version.release[:2] <= (2, 11):
        need = f"{_DISTRIBUTION} <= {_LAST_FOR_TORCH_2_11} with torch 2.11, or a later torch"
        found = f"{_DISTRIBUTION} {text} and torch {machine.versions['torch']}"
        return (Refusal("torch", need, found),)
    return ()


BACKEND = DeepGemm()
