"""Compile every kernel for GPUs that this machine does not have, and print what came out as JSON.

Run as a script, without TRITON_INTERPRET, by `test_compile_targets`. The launchers are called with
CPU tensors; a stand-in driver names the target, and a launch is turned into a compilation. So the
very arguments, tiles and specialisations of real calls are compiled, down to the cubin where the
assembler inside Triton knows the target.

    python tests/kernels/compile_targets.py [--dump DIRECTORY] [--only TARGET]
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fp8dispatch.kernels import (
    combine_experts,
    dequantize,
    float8,
    fused_quantize,
    grad_input,
    quantize_activation,
    scaled_gemm,
)
from fp8dispatch.kernels.gemm_config import choose_config
from fp8dispatch.kernels.gemm_tiles import candidates
from fp8dispatch.kernels.launch import DeviceLimits
from fp8dispatch.kernels.tile import Tile

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E4M3_FNUZ, E5M2_FNUZ = torch.float8_e4m3fnuz, torch.float8_e5m2fnuz

LIMITS = {
    80: DeviceLimits(capability=(8, 0), multiprocessors=108, shared_memory=166_912),
    89: DeviceLimits(capability=(8, 9), multiprocessors=128, shared_memory=101_376),
    90: DeviceLimits(capability=(9, 0), multiprocessors=132, shared_memory=232_448),
    100: DeviceLimits(capability=(10, 0), multiprocessors=148, shared_memory=232_448),
    120: DeviceLimits(capability=(12, 0), multiprocessors=170, shared_memory=101_376),
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class StandInDriver:
    """Answers what Triton's compiler asks of a driver."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Recorder:
    """Compiles launches for one target instead of running them."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.compiled: list[Any] = []

    def install(self) -> None:
        limits = LIMITS[self.target]
        driver.set_active(StandInDriver(self.target))
        scaled_gemm.device_limits = lambda device: limits
        float8.native_float8 = lambda dtype, device: (
            dtype in (E4M3, E5M2) and limits.capability >= (8, 9)
        )
        recorder = self

        def compile_only(function: Any, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                recorder.compiled.append(function.warmup(*args, grid=grid, **kwargs))

            return launch

        JITFunction.__getitem__ = compile_only


def fp8(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((rows, cols), dtype=torch.uint8).view(dtype)


def gemm(
    m: int,
    block_size: tuple[int, int] | None,
    *,
    formats: tuple[torch.dtype, torch.dtype] = (E4M3, E4M3),
    n: int = 4096,
    k: int = 1024,
    transposed: bool = False,
    bias: bool = False,
    tile: Tile | None = None,
) -> None:
    a = fp8(m, k, formats[0])
    b = fp8(k, n, formats[1]).t() if transposed else fp8(n, k, formats[1])
    if block_size is None:
        a_scale, b_scale = torch.ones(m, 1), torch.ones(n, 1)
    else:
        groups = -(-k // block_size[1])
        a_scale = torch.ones(groups, -(-m // 4) * 4).t()[:m]
        b_scale = torch.ones(-(-n // block_size[0]), groups)
    out = torch.empty(m, n, dtype=torch.bfloat16)
    bias_tensor = torch.empty(n, dtype=torch.bfloat16) if bias else None
    scaled_gemm.scaled_gemm(a, a_scale, b, b_scale, bias_tensor, out, block_size, tile=tile)


def wide(m: int, dtype: torch.dtype, block_size: tuple[int, int] | None) -> None:
    n, k = 4096, 1024
    x, out = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
    scale = torch.ones(n, 1) if block_size is None else torch.ones(n, k)
    scaled_gemm.scaled_gemm(x, None, fp8(n, k, E4M3), scale, None, out, block_size)


def groups(m: int, group_size: int, dtype: torch.dtype, k: int = 2048) -> None:
    x = torch.empty(m, k, dtype=torch.bfloat16)
    scale = torch.empty(-(-k // group_size), m).t()
    quantize_activation.quantize_groups(x, fp8(m, k, dtype), scale, group_size)


def rows(m: int, k: int, dtype: torch.dtype) -> None:
    x = torch.empty(m, k, dtype=torch.bfloat16)
    quantize_activation.quantize_rows(x, fp8(m, k, dtype), torch.empty(m, 1))


def static(dtype: torch.dtype) -> None:
    x = torch.empty(256, 2048, dtype=torch.bfloat16)
    quantize_activation.quantize_static(x, fp8(256, 2048, dtype), torch.empty(1))


def weight(block_size: tuple[int, int] | None, dtype: torch.dtype) -> None:
    scale = torch.ones(1024, 1) if block_size is None else torch.ones(1024, 1024)
    out = torch.empty(1024, 1024, dtype=torch.bfloat16)
    dequantize.dequantize_weight(fp8(1024, 1024, dtype), scale, out, block_size)


def combine(*, backward: bool) -> None:
    rows = torch.empty(64, 7168, dtype=torch.bfloat16)
    ids, shares = torch.zeros(64, dtype=torch.int64), torch.ones(8, 8)
    out = torch.empty(8, 7168, dtype=torch.bfloat16)
    if backward:
        combine_experts.combine_rows_backward(
            out, rows, ids, shares, 256, torch.empty_like(rows), torch.empty_like(shares)
        )
    else:
        combine_experts.combine_rows(rows, ids, shares, 256, out)


def grad(m: int, block_size: tuple[int, int] | None, weight_dtype: torch.dtype, dtype: str) -> None:
    n, k = 1024, 2048
    dy = torch.empty(m, n, dtype=getattr(torch, dtype))
    scale = torch.ones(n, 1) if block_size is None else torch.ones(n, k)
    out = torch.empty(m, k, dtype=dy.dtype)
    grad_input.grad_input(dy, fp8(n, k, weight_dtype), scale, out, block_size)


def norm(k: int, group: int, dtype: torch.dtype = E4M3, *, residual: bool = True) -> None:
    x = torch.empty(256, k, dtype=torch.bfloat16)
    other, total = (x, x) if residual else (None, None)
    scale = torch.empty(-(-k // group), 256).t()
    fused_quantize.rms_norm_quantize(x, x[0], 1e-6, fp8(256, k, dtype), scale, group, other, total)


def silu(m: int, k: int, group: int, dtype: torch.dtype = E4M3) -> None:
    gate, up = torch.empty(m, 2 * k, dtype=torch.bfloat16).chunk(2, 1)
    scale = torch.empty(-(-k // group), m).t()
    fused_quantize.silu_mul_quantize(gate, up, fp8(m, k, dtype), scale, group)


def tiles(target: int, m: int, block_size: tuple[int, int] | None) -> dict[str, Any]:
    """The tiles that tuning times on a target, by name."""
    limits, upcast = LIMITS[target], target < 89
    chosen = choose_config(
        m, 4096, block_size=block_size, upcast=upcast, descriptors=True, limits=limits
    )
    recipe = "row" if block_size is None else "block"
    return {
        f"gemm_tile {recipe} M={m} {tile}": functools.partial(gemm, m, block_size, tile=tile)
        for tile in candidates(chosen, block_size, upcast, limits)
    }


BLOCK = (128, 128)
DECODED = {  # formats that the target cannot multiply: these run everywhere
    "groups": lambda: groups(2048, 128, E4M3_FNUZ),
    "gemm_block": lambda: gemm(2048, BLOCK, formats=(E4M3_FNUZ, E5M2_FNUZ), bias=True),
    "weight": lambda: weight(BLOCK, E4M3_FNUZ),
    "grad": lambda: grad(2048, BLOCK, E4M3_FNUZ, "bfloat16"),
    "gemm_wide": lambda: wide(2048, torch.bfloat16, BLOCK),
    "gemm_wide_few": lambda: wide(64, torch.float16, None),
    "norm": lambda: norm(7168, 128, E4M3_FNUZ),
    "silu": lambda: silu(2048, 7168, 128, E4M3_FNUZ),
}
NATIVE = {
    "groups": lambda: groups(2048, 128, E4M3),
    "gemm_block": lambda: gemm(2048, BLOCK),
    "gemm_small": lambda: gemm(8, BLOCK),
    "gemm_row": lambda: gemm(2048, None, formats=(E4M3, E5M2), bias=True),
    "weight": lambda: weight(BLOCK, E4M3),
    "grad": lambda: grad(2048, BLOCK, E4M3, "bfloat16"),
    "gemm_wide": lambda: wide(2048, torch.bfloat16, BLOCK),
    "gemm_wide_few": lambda: wide(64, torch.float16, None),
    "norm": lambda: norm(7168, 128),
    "silu": lambda: silu(2048, 7168, 128),
}
VARIANTS: dict[int, dict[str, Any]] = {
    # FP8 of any kind is bytes here, so the OCP formats are compiled as bytes too.
    80: DECODED
    | {
        "gemm_small": lambda: gemm(8, BLOCK, formats=(E4M3, E5M2)),
        "gemm_row": lambda: gemm(2048, None),
        "rows": lambda: rows(256, 2048, E4M3),
        "static": lambda: static(E4M3),
        "combine": lambda: combine(backward=False),
    },
    89: NATIVE
    | {
        "gemm_wide_fp32": lambda: wide(2048, torch.float32, BLOCK),
        "grad_group": lambda: grad(2048, (1, 32), E4M3, "bfloat16"),
    },
    90: NATIVE
    | {
        "gemm_decoded": DECODED["gemm_block"],
        "gemm_32_rows": lambda: gemm(32, BLOCK),
        "gemm_64_rows": lambda: gemm(64, BLOCK),
        "gemm_odd_block": lambda: gemm(2048, (48, 80), n=4104, k=1000),
        "gemm_transposed": lambda: gemm(2048, BLOCK, transposed=True),
        "gemm_narrow_block": lambda: gemm(2048, (1, 32), k=512),
        "groups_few": lambda: groups(8, 128, E4M3),
        "groups_odd": lambda: groups(256, 48, E4M3),
        "rows": lambda: rows(256, 7168, E4M3),
        "rows_long": lambda: rows(256, 65536, E4M3),
        "static": lambda: static(E4M3),
        "weight_odd": lambda: weight((48, 80), E5M2),
        "combine": lambda: combine(backward=False),
        "combine_backward": lambda: combine(backward=True),
        "norm_row": lambda: norm(16384, 16384, residual=False),
        "norm_long": lambda: norm(32768, 128),
        "norm_long_row": lambda: norm(32768, 32768),
        "silu_few": lambda: silu(16, 7168, 128),
        "silu_row": lambda: silu(2048, 14336, 14336),
        "silu_long_row": lambda: silu(2048, 53248, 53248),
        "grad_few": lambda: grad(16, BLOCK, E4M3, "bfloat16"),
        "grad_row": lambda: grad(2048, None, E5M2, "float16"),
        "grad_group": lambda: grad(2048, (1, 32), E4M3, "bfloat16"),
    },
    100: dict(NATIVE),
    120: dict(NATIVE),
}
for target, variants in VARIANTS.items():
    variants |= tiles(target, 2048, BLOCK)
VARIANTS[90] |= tiles(90, 2048, None) | tiles(90, 64, BLOCK) | tiles(90, 8, BLOCK)


def facts(kernel: Any) -> dict[str, Any]:
    """What the test asserts: instructions, accumulators, registers, spills."""
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    dots, fresh_dots = accumulators(ttgir)
    return {
        "kernel": kernel.metadata.name,
        "fp8_wgmma": len(re.findall(r"wgmma\.mma_async\S*\.f32\.e[45]m\d", ptx)),
        "fp8_mma": len(re.findall(r"mma\.sync\S*\.f32\.e[45]m\d", ptx)),
        "fp8_conversions": len(re.findall(r"cvt\.\S*e[45]m\d", ptx)),
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        "dots": dots,
        "fresh_dots": fresh_dots,
        "shared": kernel.metadata.shared,
        **resource_usage(kernel.asm["cubin"]),
    }


def accumulators(ttgir: str) -> tuple[int, int]:
    """Count the dots, and those whose accumulator is a constant zero or is overwritten."""
    zeros = set(re.findall(r"(%\S+) = arith\.constant dense<0\.0+e\+00> : tensor<\S+xf32", ttgir))
    third_operands = re.findall(r"(?:warp_group_dot|tt\.dot) %\S+, %\S+, (%\w+)", ttgir)
    # tcgen05: a, b, accumulator[its token], whether to add to it, predicate
    uses_old = re.findall(r"tc_gen5_mma %\S+, %\S+, %\w+(?:\[[^]]*\])?, (%\w+),", ttgir)
    fresh = sum(operand in zeros for operand in third_operands)
    return len(third_operands) + len(uses_old), fresh + uses_old.count("%false")


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing.stdout)
    if found is None:
        raise RuntimeError(f"no resource usage in: {listing.stdout}")
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[3])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dump", type=Path, help="write ttgir, ptx and cubin here")
    parser.add_argument("--only", type=int, choices=sorted(VARIANTS))
    arguments = parser.parse_args()
    report: dict[str, dict[str, Any]] = {}
    for target, variants in VARIANTS.items():
        if arguments.only not in (None, target):
            continue
        recorder = Recorder(target)
        recorder.install()
        for name, call in variants.items():
            call()
            kernel = recorder.compiled[-1]
            report[f"{target}.{name}"] = facts(kernel)
            if arguments.dump:
                for kind in ("ttgir", "ptx", "cubin"):
                    content = kernel.asm[kind]
                    place = arguments.dump / f"{target}.{name}.{kind}"
                    place.write_bytes(content if isinstance(content, bytes) else content.encode())
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
