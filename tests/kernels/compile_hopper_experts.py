"""Compile the grouped Gluon kernel, and the rows before it, for sm_90 without a GPU: facts as JSON.

Run as a script, without TRITON_INTERPRET, by `test_compile_hopper_experts`; see `compile_hopper`.

    python tests/kernels/compile_hopper_experts.py [--all]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

import torch
import triton
from triton.runtime import driver

from fp8dispatch.kernels import float8, gluon_launch, hopper_experts_launch
from fp8dispatch.kernels.sorted_rows import SortedRows
from tests.kernels.compile_hopper import H200, SM_90, disassembled, facts
from tests.kernels.compile_targets import StandInDriver, resource_usage

MULTIPLICATION = "hopper_experts"


class Recorder:
    """Compiles launches instead of running them, and keeps what came out, by kernel."""

    def __init__(self) -> None:
        self.compiled: dict[str, Any] = {}

    def install(self) -> None:
        driver.set_active(StandInDriver(SM_90))
        hopper_experts_launch.device_limits = lambda device: H200
        float8.native_float8 = lambda dtype, device: True
        recorder = self

        def compile_only(
            kernel: gluon_launch.Kernel, grid: Any, views: Any, rest: Any, device: int, **_: Any
        ) -> None:
            made = kernel._function.warmup(
                *kernel._descriptors(views), *rest, grid=(1,), **kernel._options
            )
            recorder.compiled[made.metadata.name] = made

        # Plain Triton kernels are launched by the same function, be it a base class's.
        kinds = gluon_launch.Kernel.__mro__
        owner: Any = next(kind for kind in kinds if "__call__" in vars(kind))
        owner.__call__ = compile_only


def call(
    experts: int,
    n: int,
    k: int,
    rows: int = 1000,
    *,
    scales: str = "block",
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    indexed: bool = True,
    static: bool = False,
) -> None:
    """One call with tensors of these sizes; the weight is one row of memory, seen as all of it."""
    index = torch.zeros(rows, dtype=torch.int32) if indexed else None
    weight = torch.zeros(k, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(experts, n, k)
    shape = {"block": (experts, -(-n // 128), -(-k // 128)), "row": (experts, n)}.get(scales)
    hopper_experts_launch.experts_matmul(
        torch.empty(16, k, dtype=torch.bfloat16),
        torch.ones(experts) if static else None,
        weight,
        torch.ones(shape or (experts, 1)),
        torch.zeros(experts, n, dtype=torch.bfloat16) if bias else None,
        torch.empty(rows, n, dtype=dtype),
        SortedRows(torch.zeros(experts, dtype=torch.int32), rows, index, index),
    )


FP32, FP16 = torch.float32, torch.float16

# What the tests compile; --all compiles the rest too.
VARIANTS: dict[str, Any] = {
    "prefill": lambda: call(8, 4096, 7168),
    "row_bias": lambda: call(8, 4096, 7168, scales="row", bias=True),
    "fp32_bias": lambda: call(8, 4096, 7168, dtype=FP32, bias=True, indexed=False),
    "ragged": lambda: call(3, 4099, 1040, dtype=FP16, bias=True, static=True),
}
MORE: dict[str, Any] = {
    "short": lambda: call(8, 7168, 2048),
    "many": lambda: call(128, 1536, 2048),
    "bias": lambda: call(8, 4096, 7168, bias=True),
    "tensor": lambda: call(8, 4096, 7168, scales="tensor"),
    "one_block": lambda: call(1, 16, 128, rows=3),
    "ragged_fp32": lambda: call(8, 4099, 7168, dtype=FP32, bias=True),
    "ragged_row": lambda: call(8, 4099, 7168, scales="row", bias=True),
    "ragged_row_fp32": lambda: call(8, 4099, 7168, scales="row", dtype=FP32, bias=True),
    "pairs": lambda: call(8, 4098, 7168, bias=True),
    "pairs_row_fp32": lambda: call(8, 4098, 7168, scales="row", dtype=FP32, bias=True),
    "fours": lambda: call(8, 4100, 7168, bias=True),
    "long": lambda: call(8, 4099, 16400, bias=True),
    "long_row": lambda: call(8, 512, 32_768, scales="row"),
}


def told(kernel: Any) -> dict[str, Any]:
    """What the test asserts of one kernel."""
    if kernel.metadata.name != MULTIPLICATION:
        return {"spills": resource_usage(kernel.asm["cubin"])["stack"]}
    sass = disassembled(kernel.asm["cubin"])
    widths = re.findall(r"\bSTG\.E(?:\.U?)?(\w*)", sass)
    stores = {width or "32": widths.count(width) for width in sorted(set(widths))}
    return {"stores": stores, **facts(kernel)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="also the rarer variants")
    arguments = parser.parse_args()
    recorder = Recorder()
    recorder.install()
    report: dict[str, Any] = {}
    for name, run in (VARIANTS | (MORE if arguments.all else {})).items():
        run()
        report[name] = {one: told(kernel) for one, kernel in recorder.compiled.items()}
        recorder.compiled.clear()
    report["triton"] = triton.__version__
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
