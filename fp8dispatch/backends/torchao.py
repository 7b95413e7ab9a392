"""TorchAO's Triton block GEMM: 1x128 activation groups, 128x128 weight blocks, bf16 output.

Read in the releases 0.12 to 0.18 and in main (0.19):

* ``blockwise_fp8_gemm(a, a_s, b, b_s, block_size)``, all four contiguous (asserted): scales
  [M, K / 128] and [ceil(N / 128), ceil(K / 128)] row-major. The function moved three times.
* Its pointer arithmetic is in 32 bits, and it launches on the current device.
* From 0.15 the output is bf16; before, it has the process's default dtype, fp32 as a rule, which is
  rounded here once.
* The first call for each N, K and power of two of M times 48 configurations, seconds each time;
  from 0.16 the first call of all defines the kernels, without a lock before 0.18.
* Up to 0.15 the import initialises CUDA; it happens at the first call here, when that is done.
* Its own activation quantiser divides by zero on a block of zeros; ours is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.library import (
    GROUP,
    LibraryBackend,
    Warmed,
    first_line,
    refuse_block,
    refuse_operands,
)
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import Granularity

if TYPE_CHECKING:
    import torch

_NIGHTLY = "torchao-nightly"
_LOCATIONS = (
    ("torchao.kernel.blockwise_quantization", "blockwise_fp8_gemm"),  # 0.15 to 0.18
    ("torchao.prototype.blockwise_fp8_inference", "blockwise_fp8_gemm"),  # 0.13, 0.14
    ("torchao.prototype.blockwise_fp8", "blockwise_fp8_gemm"),  # 0.12
    ("torchao.quantization.quantize_.workflows.float8.kernels", "_blockwise_fp8_gemm"),  # 0.19
)


class TorchAO(LibraryBackend):
    """``blockwise_fp8_gemm`` of torchao, wherever its release keeps it."""

    name = "torchao"
    distribution = "torchao"
    distributions = (_NIGHTLY,)
    minimum_version = "0.12"
    install_hint = " (pip install torchao)"
    capabilities = ((8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
    verified_capabilities: ClassVar[tuple[tuple[int, int], ...]] = ((9, 0),)
    verified_versions: ClassVar[Mapping[str, tuple[str, ...]]] = {"torchao": ("0.17.0",)}
    recipes = frozenset({Granularity.BLOCK})
    align_k = GROUP
    needs_to_load = "torchao with its blockwise_fp8_gemm"
    matmul = computed_in("fp8dispatch.backends.compute.torchao")

    def __init__(self) -> None:
        super().__init__()
        self._gemm: Callable[..., torch.Tensor] | None = None
        self._warmed = Warmed(self.name, "times 48 configurations")

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        if "torchao" not in machine.versions and _NIGHTLY in machine.versions:
            nightly = {**machine.versions, "torchao": machine.versions[_NIGHTLY]}
            machine = replace(machine, versions=nightly)
        refusals = list(super().refuse_machine(machine))
        if machine.version("triton") is None:
            found = machine.versions.get("triton", "none")
            refusals.append(Refusal("version", "triton, which its kernel is written in", found))
        return tuple(refusals)

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        return refuse_operands(problem, contiguous=True) + refuse_block(problem)

    def _load(self) -> tuple[Refusal, ...]:
        failures: list[str] = []
        for module, name in _LOCATIONS:
            try:
                self._gemm = getattr(import_module(module), name)
            except (ImportError, AttributeError) as error:
                failures.append(f"{module}: {first_line(error)}")
            else:
                return ()
        return (Refusal("import", self.needs_to_load, "; ".join(failures)),)


BACKEND = TorchAO()
