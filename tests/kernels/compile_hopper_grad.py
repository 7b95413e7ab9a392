"""Compile the Gluon kernel for dX for sm_90 without a GPU, and print what came out as JSON.

Run as a script, without TRITON_INTERPRET, by `test_compile_hopper_grad`; see `compile_hopper`.

    python tests/kernels/compile_hopper_grad.py [--all]
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

from fp8dispatch.kernels import direct_launch, hopper_grad_launch
from fp8dispatch.kernels.hopper_grad_config import FEW, TALL, WIDE, GradConfig
from fp8dispatch.quantization.weight import block_of
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Recipe
from tests.kernels.compile_hopper import H200, SM_90, disassembled, serialised
from tests.kernels.compile_targets import StandInDriver, resource_usage

_SHUFFLED = re.compile(r"\bLDSM\.16\.MT88\.4\b")
_PRODUCT = re.compile(r"\bHGMMA\.64x(\d+)x16\.F32\S* R(\d+), R(\d+), gdesc")
_WRITTEN = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]+)\s+(?:P\d, )?R(\d+)")


class Recorder:
    """Compiles launches instead of running them, and keeps what came out."""

    def __init__(self) -> None:
        self.compiled: Any = None

    def install(self) -> None:
        driver.set_active(StandInDriver(SM_90))
        hopper_grad_launch.device_limits = lambda device: H200
        memory = torch.empty(4), torch.zeros(4, dtype=torch.int32)
        hopper_grad_launch.workspace = lambda device, elements, counters: memory
        recorder = self

        def compile_only(
            kernel: direct_launch.Kernel, grid: Any, views: Any, rest: Any, device: int, **_: Any
        ) -> None:
            recorder.compiled = kernel._function.warmup(
                *kernel._descriptors(views), *rest, grid=(1,), **kernel._options
            )

        direct_launch.Kernel.__call__ = compile_only  # type: ignore[method-assign]


def call(
    m: int,
    n: int,
    k: int,
    recipe: Recipe = BLOCK_128,
    dtype: torch.dtype = torch.bfloat16,
    config: GradConfig | None = None,
) -> None:
    """One call with tensors of these sizes."""
    block = block_of(recipe, n, k)
    hopper_grad_launch.grad_input(
        torch.empty(m, n, dtype=dtype),
        torch.zeros(n, k, dtype=torch.uint8).view(torch.float8_e4m3fn),
        torch.ones(-(-n // block[0]), -(-k // block[1])),
        torch.empty(m, k, dtype=dtype),
        block,
        config,
    )


FP16 = torch.float16

# What the tests compile; --all compiles the rest too.
VARIANTS: dict[str, Any] = {
    "wide": lambda: call(4096, 4096, 4096, config=WIDE),
    "wide_rows_fp16": lambda: call(4096, 4096, 4096, ROW, FP16, WIDE),
    "tall": lambda: call(4096, 4096, 4096, config=TALL),
    "wide_ahead": lambda: call(4096, 4096, 4096, config=WIDE._replace(ahead=True)),
    "split": lambda: call(256, 4096, 4096, config=WIDE._replace(split=2)),
    "few": lambda: call(16, 4096, 4096),
    "few_rows_64": lambda: call(64, 4096, 4096, ROW),
}
MORE: dict[str, Any] = {
    "wide_fp16": lambda: call(4096, 4096, 4096, dtype=FP16, config=WIDE),
    "wide_tensor": lambda: call(4096, 4096, 4096, TENSOR, config=WIDE),
    "tall_ahead": lambda: call(4096, 4096, 4096, config=TALL._replace(ahead=True)),
    "split_rows_fp16": lambda: call(256, 4096, 4096, ROW, FP16, WIDE._replace(split=3)),
    "tall_split": lambda: call(256, 4096, 4096, config=TALL._replace(split=2)),
    "tall_rows": lambda: call(256, 4096, 4096, ROW, config=TALL),
    **{
        f"few_{rows}_{recipe}": lambda recipe=recipe, config=config: call(
            config.block_m, 4096, 4096, recipe, FP16, config
        )
        for rows, config in FEW.items()
        for recipe in (ROW, TENSOR, BLOCK_128)
    },
}


def overwritten(sass: str) -> list[str]:
    """Instructions that write to a register of a product before it was waited for."""
    busy: set[int] = set()
    found = []
    for line in sass.splitlines():
        if product := _PRODUCT.search(line):
            columns, acc, operand = map(int, product.groups())
            busy |= {*range(acc, acc + columns // 2), *range(operand, operand + 4)}
        elif "WARPGROUP.DEPBAR" in line:
            busy.clear()
        elif (written := _WRITTEN.match(line)) and not written[1].startswith(("ST", "SYNCS")):
            width = 4 if _SHUFFLED.search(line) or ".128" in written[1] else 1
            width = 2 if ".64" in written[1] or written[1].startswith("CS2R") else width
            if busy & {*range(int(written[2]), int(written[2]) + width)}:
                found.append(line.strip())
    return found


def facts(kernel: Any) -> dict[str, Any]:
    """What the test asserts: instructions, registers, spills, memory."""
    ptx, sass = kernel.asm["ptx"], disassembled(kernel.asm["cubin"])
    loop = sass[sass.index("HGMMA") :]
    before_wait = loop[: loop.index("WARPGROUP.DEPBAR")]
    return {
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        "products": len(_PRODUCT.findall(sass)),
        "overwritten": overwritten(sass),
        "loads_of_codes": len(_SHUFFLED.findall(before_wait)),
        "decoded": len(re.findall(r"F2FP\.F16\.E4M3\.UNPACK_B", before_wait)),
        "scaled": len(re.findall(r"\bFMUL\b", before_wait)),
        "rounded": len(re.findall(r"F2FP\.(?:BF16|F16)\.F32\.PACK_AB", before_wait)),
        "local_loads": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "highest_register": max(int(number) for number in re.findall(r"\bR(\d+)\b", sass)),
        "shared": kernel.metadata.shared,
        "scratch": kernel.metadata.global_scratch_size,
        "serialised": serialised(ptx),
        **resource_usage(kernel.asm["cubin"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="also the rarer variants")
    arguments = parser.parse_args()
    recorder = Recorder()
    recorder.install()
    report: dict[str, Any] = {}
    for name, run in (VARIANTS | (MORE if arguments.all else {})).items():
        run()
        report[name] = facts(recorder.compiled)
    report["triton"] = triton.__version__
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
