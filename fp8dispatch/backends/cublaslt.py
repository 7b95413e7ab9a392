"""cuBLASLt through ``torch.nn.functional.scaled_mm``: per tensor, per row, and blocks on Hopper.

What it needs, and what was measured on an H200 (torch 2.11, cuBLAS 13.1):

* N and K multiples of 16, a row-major weight, 16-byte aligned memory.
* Blocks only as 128x128 weights or 1x128 groups, only on capability 9.0, with CUDA 12.9 or later.
  Activation scales are M-major with M a multiple of 4 (otherwise CUBLAS_STATUS_NOT_SUPPORTED), so
  M is padded. Scales of 128x128 weights are K-major with K padded to 4 blocks, once per weight.
  The older ``torch._scaled_mm`` takes them unpadded and then computes garbage; it is not used.
* A bias is fused in the output's own dtype, bf16 or fp16; any other bias is added to an fp32
  product, which costs a pass over it.
* ``use_fast_accum`` trades accuracy for 10 to 20 % of time in the per-row and per-tensor
  recipes; it is on only where the policy allows `Accuracy.FAST`. Blocks are always exact.
"""

from __future__ import annotations

from packaging.version import Version

from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.recipe import Granularity

_BLOCKS = ((128, 128), (1, 128))
_BLOCK_CAPABILITY = (9, 0)
_BLOCK_CUDA = "12.9"
_M_ALIGN = 4  # activation scales are fp32 and M-major: 16 bytes per group


class CuBlasLt(Backend):
    """FP8 GEMMs of the cuBLASLt that torch was built with."""

    name = "cublaslt"
    distribution = "torch"
    distributions = ("nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cublas-cu13")
    minimum_version = "2.10"
    capabilities = ((8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
    verified_capabilities = ((9, 0),)
    weight_dtypes = frozenset({"float8_e4m3fn", "float8_e5m2"})
    align_n = 16
    align_k = 16
    accuracies = frozenset({Accuracy.EXACT, Accuracy.FAST})
    matmul = computed_in("fp8dispatch.backends.compute.cublaslt")

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals: list[Refusal] = []
        if not problem.weight_row_major:
            refusals.append(Refusal("layout", "a row-major weight [N, K]", "other strides"))
        if not problem.aligned:
            refusals.append(
                Refusal("alignment", "weight memory aligned to 16 bytes", "an odd address")
            )
        if problem.activation_dtype == problem.weight_dtype == "float8_e5m2":
            refusals.append(Refusal("dtype-pair", "at most one e5m2 operand", "two"))
        if problem.recipe.granularity is Granularity.BLOCK:
            refusals += _refuse_block(problem, machine)
        return refusals

    def row_multiple(self, problem: LinearProblem) -> int:
        return _M_ALIGN if problem.recipe.granularity is Granularity.BLOCK else 1


def _refuse_block(problem: LinearProblem, machine: Machine) -> list[Refusal]:
    refusals: list[Refusal] = []
    if machine.capability != _BLOCK_CAPABILITY:
        refusals.append(Refusal("capability", "capability 9.0 for block scales", str(machine)))
    cuda = machine.version("cuda")
    if cuda is None or cuda < Version(_BLOCK_CUDA):
        refusals.append(
            Refusal(
                "cuda",
                f"torch built with CUDA >= {_BLOCK_CUDA} for block scales",
                machine.versions.get("cuda", "none"),
            )
        )
    if problem.weight_dtype != "float8_e4m3fn":
        refusals.append(
            Refusal("weight-dtype", "float8_e4m3fn weights with blocks", problem.weight_dtype)
        )
    if problem.recipe.block_size not in _BLOCKS:
        refusals.append(Refusal("block-size", "blocks 128x128 or 1x128", str(problem.recipe)))
    return refusals


BACKEND = CuBlasLt()
