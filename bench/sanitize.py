"""Runs the kernels of one backend once per variant, to be watched by compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python -m bench sanitize [BACKEND]

Without a name these are our Triton kernels in every variant; a library's are run where it takes the
call. Without torch's memory cache every tensor is an allocation of its own, so a read or write past
its end is seen. Numbers are checked as well: a kernel that computes nothing would be clean too.
"""

from __future__ import annotations

import sys

import torch

import fp8dispatch
from tests import matrix, oracle

SHAPES = ((1, 256, 512), (3, 201, 333), (37, 264, 1040), (130, 272, 640), (300, 129, 257))


def main(arguments: list[str]) -> int:
    """Forward and backward of the matrix's recipes on ragged shapes, all formats and layouts."""
    backend = arguments[0] if arguments else "triton"
    calls = 0
    bench = matrix.Bench("cuda")
    for recipe in matrix.RECIPES:
        for m, n, k in SHAPES:
            for bias, static in (("none", False), ("float32", False), ("float32", True)):
                case = matrix.Case(backend, recipe, m, n, k, torch.bfloat16, bias, static)
                calls += bench.run(case).refusal is None
    if not calls:
        print(f"{backend} took none of the calls")
        return 1
    if backend != "triton":
        torch.cuda.synchronize()
        print(f"{backend}: {calls} calls, numbers right")
        return 0
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        for recipe in ("row", "block128x128", "group32"):
            _other_format(dtype, recipe)
            calls += 1
    _transposed()
    torch.cuda.synchronize()
    print(f"{calls + 1} calls, numbers right")
    return 0


def _other_format(dtype: torch.dtype, recipe: str) -> None:
    chosen = matrix.RECIPES[recipe]
    weight, scale = oracle.make_weight(201, 333, chosen, dtype=dtype, device="cuda")
    x = torch.randn(37, 333, device="cuda")
    out = fp8dispatch.fp8_linear(x, weight, scale, block_size=chosen.block_size, backend="triton")
    expected = oracle.truth(
        oracle.dequantized_activations(x, chosen, dtype),
        oracle.dequantized_weight(weight, scale, chosen),
    )
    oracle.assert_matches(out, expected, label=f"{dtype} {recipe}")


def _transposed() -> None:
    chosen = matrix.RECIPES["block128x128"]
    weight, scale = oracle.make_weight(201, 333, chosen, device="cuda")
    physically = weight.view(torch.uint8).t().contiguous().view(weight.dtype)
    x = torch.randn(333, 37, device="cuda").t()
    out = fp8dispatch.fp8_linear(x, physically, scale.t(), backend="triton")
    expected = oracle.truth(
        oracle.dequantized_activations(x, chosen),
        oracle.dequantized_weight(weight, scale, chosen),
    )
    oracle.assert_matches(out, expected, label="transposed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
