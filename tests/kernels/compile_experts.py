"""Compile the kernels of expert matmuls for GPUs that are not here, and print the facts as JSON.

Run as a script, without TRITON_INTERPRET, by `test_compile_experts`; see `compile_targets`, whose
stand-in driver turns the launches of real calls into compilations.

    python tests/kernels/compile_experts.py [--only TARGET]
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from fp8dispatch.kernels import (
    experts_backward,
    experts_gemm,
    experts_quantize,
    experts_routing,
)
from fp8dispatch.kernels.sorted_rows import NamedRows, SortedRows
from tests.kernels.compile_targets import E4M3, E4M3_FNUZ, LIMITS, Recorder, facts, fp8

BLOCK = (128, 128)


def routed(rows: int, experts: int, *, indexed: bool) -> SortedRows:
    index = torch.zeros(rows, dtype=torch.int32) if indexed else None
    return SortedRows(torch.zeros(experts, dtype=torch.int32), rows, index, index)


def scales(experts: int, n: int, k: int, block: tuple[int, int] | None) -> torch.Tensor:
    if block is None:
        return torch.ones(experts, n, 1)
    return torch.ones(experts, -(-n // block[0]), -(-k // block[1]))


def experts_fp8(experts: int, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return fp8(experts * n, k, dtype).view(experts, n, k)


def gemm(
    rows: int,
    experts: int,
    block: tuple[int, int] | None,
    *,
    n: int = 1024,
    k: int = 1024,
    dtype: torch.dtype = E4M3,
    indexed: bool = False,
    bias: bool = False,
) -> None:
    groups = 1 if block is None else -(-k // block[1])
    experts_gemm.experts_gemm(
        fp8(rows, k, dtype),
        torch.ones(groups, rows).t(),
        experts_fp8(experts, n, k, dtype),
        scales(experts, n, k, block),
        torch.zeros(experts, n, dtype=torch.bfloat16) if bias else None,
        torch.empty(rows, n, dtype=torch.bfloat16),
        block,
        routed(rows, experts, indexed=indexed),
    )


def gemm_named(rows: int, experts: int, n: int = 1024, k: int = 1024) -> None:
    ids = torch.zeros(rows, dtype=torch.int64)
    experts_gemm.experts_gemm(
        fp8(rows, k, E4M3),
        torch.ones(k // 128, rows).t(),
        experts_fp8(experts, n, k, E4M3),
        scales(experts, n, k, BLOCK),
        None,
        torch.empty(rows, n, dtype=torch.bfloat16),
        BLOCK,
        NamedRows(ids, rows, ids),
    )


def grad_input(
    rows: int,
    experts: int,
    block: tuple[int, int] | None,
    *,
    n: int = 512,
    k: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    weight: torch.dtype = E4M3,
    scattered: bool = False,
) -> None:
    experts_backward.grad_input(
        torch.empty(rows, n, dtype=dtype),
        experts_fp8(experts, n, k, weight),
        scales(experts, n, k, block),
        torch.empty(rows, k, dtype=dtype),
        block,
        routed(rows, experts, indexed=True),
        rows,
        scattered=scattered,
    )


def grad_bias() -> None:
    experts_backward.grad_bias(
        torch.empty(256, 512, dtype=torch.bfloat16),
        torch.empty(8, 512),
        routed(256, 8, indexed=True),
        256,
    )


def sum_rows() -> None:
    order, ends = torch.zeros(256, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    values = torch.empty(256, 2048, dtype=torch.bfloat16)
    experts_backward.sum_rows(values, order, ends, torch.empty(64, 2048, dtype=torch.bfloat16))


def sort() -> None:
    ids = torch.zeros(512, dtype=torch.int64)
    order, ends = torch.zeros(512, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    experts_routing.sort_ids(ids, order, ends)


def schedule(experts: int) -> None:
    bounds = torch.zeros(2, experts + 1, dtype=torch.int32)
    offsets = torch.zeros(experts, dtype=torch.int64)
    experts_routing.schedule(offsets, 4096, 64, bounds[0], bounds[1])


def quantize(dtype: torch.dtype) -> None:
    x = torch.empty(256, 2048, dtype=torch.bfloat16)
    data, row_scale = fp8(256, 2048, dtype), torch.empty(256)
    rows = routed(256, 8, indexed=True)
    experts_quantize.quantize_sorted_static(x, torch.ones(8), data, row_scale, rows)


EVERYWHERE = {
    "gemm_prefill": lambda: gemm(2048, 8, BLOCK),
    "gemm_indexed": lambda: gemm(2048, 8, BLOCK, indexed=True, bias=True),
    "grad_input": lambda: grad_input(2048, 8, BLOCK),
}
VARIANTS: dict[int, dict[str, Any]] = {
    80: EVERYWHERE | {"quantize": lambda: quantize(E4M3)},
    89: EVERYWHERE,
    90: EVERYWHERE
    | {
        "gemm_decode": lambda: gemm(256, 128, BLOCK, n=256, indexed=True),
        "gemm_named": lambda: gemm_named(64, 16),
        "gemm_row": lambda: gemm(2048, 8, None, indexed=True),
        "gemm_decoded": lambda: gemm(2048, 8, BLOCK, dtype=E4M3_FNUZ),
        "gemm_odd_block": lambda: gemm(2048, 8, (48, 80), n=1000, k=1000, indexed=True),
        "grad_input_decode": lambda: grad_input(64, 128, None, n=64, scattered=True),
        "grad_input_fp32": lambda: grad_input(256, 8, (48, 80), dtype=torch.float32),
        "grad_bias": grad_bias,
        "sum_rows": sum_rows,
        "sort": sort,
        "schedule": lambda: schedule(128),
        "schedule_many": lambda: schedule(2000),
        "quantize": lambda: quantize(E4M3),
    },
    100: EVERYWHERE,
    120: EVERYWHERE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, choices=sorted(VARIANTS))
    arguments = parser.parse_args()
    report: dict[str, dict[str, Any]] = {}
    for target, variants in VARIANTS.items():
        if arguments.only not in (None, target):
            continue
        recorder = Recorder(target)
        recorder.install()
        limits = LIMITS[target]
        experts_gemm.device_limits = lambda device, limits=limits: limits  # type: ignore[misc]
        for name, call in variants.items():
            call()
            report[f"{target}.{name}"] = facts(recorder.compiled[-1])
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
