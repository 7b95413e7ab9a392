"""The hub kernel ``finegrained-fp8``, as a module that stands in for its versions 1, 3 and 4.

Code that was given that kernel as an object can be given this module instead; `v1` and `v4` hold
the names of one version each. Where theirs was undefined, these are not: a row of no expert is
zero, N and K may be ragged in every recipe, a block of zeros gives zeros, every call has a
gradient for its activations, and 64-bit offsets hold everywhere. Not here: versions 2 and 5, and
packed FP4 weights, which are refused.
"""

from fp8dispatch.integrations.finegrained_fp8.v1 import (
    fp8_act_quant,
    w8a8_block_fp8_matmul,
    w8a8_block_fp8_matmul_batched,
    w8a8_block_fp8_matmul_grouped,
    w8a8_fp8_matmul,
    w8a8_fp8_matmul_batched,
    w8a8_fp8_matmul_grouped,
    w8a8_tensor_fp8_matmul,
    w8a8_tensor_fp8_matmul_batched,
    w8a8_tensor_fp8_matmul_grouped,
)
from fp8dispatch.integrations.finegrained_fp8.v4 import (
    matmul_2d,
    matmul_batched,
    matmul_grouped,
    moe_fused_batched,
    moe_fused_grouped,
)

__all__ = [
    "fp8_act_quant",
    "matmul_2d",
    "matmul_batched",
    "matmul_grouped",
    "moe_fused_batched",
    "moe_fused_grouped",
    "w8a8_block_fp8_matmul",
    "w8a8_block_fp8_matmul_batched",
    "w8a8_block_fp8_matmul_grouped",
    "w8a8_fp8_matmul",
    "w8a8_fp8_matmul_batched",
    "w8a8_fp8_matmul_grouped",
    "w8a8_tensor_fp8_matmul",
    "w8a8_tensor_fp8_matmul_batched",
    "w8a8_tensor_fp8_matmul_grouped",
]
