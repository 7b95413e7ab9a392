"""Compile the Gluon kernels for sm_90 without a GPU, and print what came out as JSON.

Run as a script, without TRITON_INTERPRET, by `test_compile_hopper`. The launcher is called with CPU
tensors and its launches become compilations, so the very arguments, configurations and tensor maps
of real calls are compiled.

    python tests/kernels/compile_hopper.py [--all] [--dump DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import driver

from fp8dispatch.backends.compute import gluon
from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.gluon import BACKEND
from fp8dispatch.formats import dtype_name
from fp8dispatch.kernels import direct_launch, float8, hopper_config, hopper_launch
from fp8dispatch.kernels.hopper_config import HopperConfig, Kind, choose_config, gemm_config
from fp8dispatch.kernels.launch import DeviceLimits
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe, ceil_div
from tests.kernels.compile_targets import NVIDIA_TOOLS, StandInDriver, resource_usage

H200 = DeviceLimits(capability=(9, 0), multiprocessors=132, shared_memory=232_448)
SM_90 = 90


class Recorder:
    """Compiles launches instead of running them, and keeps what came out."""

    def __init__(self) -> None:
        self.compiled: Any = None

    def install(self) -> None:
        driver.set_active(StandInDriver(SM_90))
        hopper_launch.device_limits = lambda device: H200
        float8.native_float8 = lambda dtype, device: True
        recorder = self

        def compile_only(
            kernel: direct_launch.Kernel,
            grid: Any,
            views: Any,
            rest: Any,
            device: int,
            *,
            programmatic: bool = False,
        ) -> None:
            recorder.compiled = kernel._function.warmup(
                *kernel._descriptors(views), *rest, grid=(1,), **kernel._options
            )

        direct_launch.Kernel.__call__ = compile_only  # type: ignore[method-assign]


def call(
    m: int,
    n: int,
    k: int,
    *,
    recipe: Recipe = BLOCK_128,
    out_dtype: str = "bfloat16",
    bias: bool = False,
    config: HopperConfig | None = None,
    programmatic: bool = False,
    weight_dtype: torch.dtype = torch.float8_e4m3fn,
) -> HopperConfig:
    """One call of the backend with tensors of these sizes; the configuration that it took."""
    hopper_launch.PROGRAMMATIC = programmatic
    weight_scale = torch.ones(recipe.scale_shape(n, k))
    groups = ceil_div(k, recipe.group_size(k))
    data = torch.zeros((m, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
    x_scale = torch.ones(groups, ceil_div(m, 4) * 4).t()[:m]
    weight = torch.zeros((n, k), dtype=torch.uint8).view(weight_dtype)
    name = dtype_name(weight_dtype)
    problem = LinearProblem(m, n, k, recipe, name, "float8_e4m3fn", out_dtype, bias)
    partials = torch.empty(4), torch.zeros(4, dtype=torch.int32)
    gluon.workspace = lambda device, elements, counters: partials
    BACKEND.multiply(
        QuantizedActivation(data, x_scale),
        Weight(weight, weight_scale, recipe, weight_scale),
        torch.zeros(n, dtype=torch.bfloat16) if bias else None,
        problem,
        config,
    )
    masked = hopper_launch.is_masked(n, getattr(torch, out_dtype))
    return config or choose_config(m, n, k, masked, H200.multiprocessors)


def quantise(m: int, k: int, group: int) -> str:
    """The quantiser that lets a decode kernel start early."""
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    data = torch.zeros((m, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.ones(ceil_div(k, group), m).t()
    hopper_launch.quantize(x, data, scale, group, dependents=True)
    return f"groups of {group}"


def wide(m: int, k: int) -> HopperConfig:
    return gemm_config("wide", m, k)


def square(m: int, k: int, masked: bool = False) -> HopperConfig:
    return gemm_config("square", m, k, masked=masked)


def split(m: int, k: int, parts: int, masked: bool = False) -> HopperConfig:
    return gemm_config("split", m, k, split=parts, masked=masked)


def narrow(m: int, k: int, parts: int = 1, masked: bool = False) -> HopperConfig:
    kind: Kind = "split" if parts > 1 else "square"
    return gemm_config(kind, m, k, split=parts, masked=masked, narrow=True)


E5M2 = torch.float8_e5m2
LARGE = Recipe(Granularity.BLOCK, (384, 256))

# What the tests compile; --all compiles the rest too.
VARIANTS: dict[str, Any] = {
    "wide": lambda: call(4096, 4096, 7168),
    "square_ragged": lambda: call(130, 4099, 1040, bias=True, config=square(130, 1040, True)),
    "split": lambda: call(256, 4096, 7168, config=split(256, 7168, 2)),
    "decode": lambda: call(16, 4096, 7168),
    "decode_ragged": lambda: call(3, 201, 1040, bias=True),
    "early": lambda: call(16, 4096, 7168, programmatic=True),
    "early_split_flat": lambda: call(3, 201, 2064, bias=True, programmatic=True),
    "wide_e5m2": lambda: call(4096, 4096, 7168, weight_dtype=E5M2),
    "decode_e5m2": lambda: call(16, 4096, 7168, weight_dtype=E5M2),
    "wide_blocks": lambda: call(4096, 4096, 7168, recipe=LARGE),
    "split_blocks": lambda: call(256, 4096, 7168, recipe=LARGE, config=split(256, 7168, 2)),
    "narrow": lambda: call(256, 4096, 7168, config=narrow(256, 7168)),
    "narrow_split": lambda: call(256, 576, 7168, bias=True, config=narrow(256, 7168, 4)),
    "quantise_groups": lambda: quantise(16, 7168, 128),
    "quantise_rows": lambda: quantise(16, 7168, 7168),
}
MORE: dict[str, Any] = {
    "wide_bias": lambda: call(4096, 4096, 7168, bias=True),
    "wide_row": lambda: call(4096, 4096, 7168, recipe=ROW, bias=True),
    "wide_fp32": lambda: call(1000, 8200, 2064, out_dtype="float32", bias=True),
    "wide_fp16": lambda: call(8192, 8192, 8192, out_dtype="float16"),
    "wide_short": lambda: call(130, 264, 128, config=wide(130, 128)),
    "square": lambda: call(256, 7168, 16384),
    "square_odd": lambda: call(4096, 4200, 7024, bias=True),
    "square_row": lambda: call(256, 7168, 16384, recipe=ROW, bias=True),
    "square_fp32": lambda: call(130, 272, 1664, out_dtype="float32", config=square(130, 1664)),
    "square_short": lambda: call(130, 272, 128, config=square(130, 128)),
    "square_masked_row": lambda: call(4096, 4099, 2048, recipe=ROW, bias=True),
    "split_odd": lambda: call(130, 272, 1664, bias=True, config=split(130, 1664, 2)),
    "split_three": lambda: call(130, 2112, 7168, config=split(130, 7168, 3)),
    "split_four_odd": lambda: call(130, 272, 5760, config=split(130, 5760, 4)),
    "split_row": lambda: call(
        256, 4096, 7168, recipe=ROW, bias=True, out_dtype="float32", config=split(256, 7168, 2)
    ),
    "split_masked": lambda: call(
        256, 4099, 7168, bias=True, out_dtype="float16", config=split(256, 7168, 2, masked=True)
    ),
    "narrow_row": lambda: call(256, 6144, 4096, recipe=ROW, bias=True, config=narrow(256, 4096)),
    "narrow_fp32": lambda: call(130, 272, 1664, out_dtype="float32", config=narrow(130, 1664)),
    "narrow_masked": lambda: call(
        130, 4099, 1040, bias=True, config=narrow(130, 1040, masked=True)
    ),
    "narrow_blocks": lambda: call(256, 4096, 7168, recipe=LARGE, config=narrow(256, 7168)),
    "narrow_split_fp32": lambda: call(
        256, 2112, 7168, out_dtype="float32", recipe=ROW, bias=True, config=narrow(256, 7168, 3)
    ),
    "narrow_split_masked": lambda: call(130, 201, 1664, config=narrow(130, 1664, 2, masked=True)),
    "decode_1_row": lambda: call(1, 7168, 2048),
    "decode_32": lambda: call(32, 24576, 1536),
    "decode_64": lambda: call(64, 4096, 7168),
    "decode_64_wide": lambda: call(64, 57344, 8192),
    "decode_64_long": lambda: call(64, 16384, 53248),
    "decode_split": lambda: call(16, 512, 7168, bias=True, out_dtype="float32"),
    "decode_row": lambda: call(16, 7168, 16384, recipe=ROW, bias=True, out_dtype="float16"),
    "decode_tiny": lambda: call(1, 16, 16),
    "square_e5m2": lambda: call(256, 7168, 16384, recipe=TENSOR, weight_dtype=E5M2),
    "split_e5m2": lambda: call(256, 4096, 7168, weight_dtype=E5M2, config=split(256, 7168, 2)),
    "wide_blocks_ragged": lambda: call(
        4096, 4200, 7024, recipe=LARGE, bias=True, config=wide(4096, 7024)
    ),
    "square_blocks": lambda: call(256, 7168, 16384, recipe=LARGE, bias=True),
    "square_blocks_ragged": lambda: call(
        130, 4099, 1040, recipe=LARGE, bias=True, config=square(130, 1040, True)
    ),
    "decode_blocks": lambda: call(16, 4096, 7168, recipe=LARGE),
    "decode_blocks_64": lambda: call(64, 57344, 8192, recipe=LARGE, bias=True),
    "early_64": lambda: call(64, 4096, 7168, programmatic=True),
    "early_64_wide": lambda: call(64, 57344, 8192, bias=True, programmatic=True),
    "early_row": lambda: call(16, 7168, 16384, recipe=ROW, bias=True, programmatic=True),
}


def facts(kernel: Any) -> dict[str, Any]:
    """What the test asserts: instructions, registers, spills, memory."""
    ptx = kernel.asm["ptx"]
    sass = disassembled(kernel.asm["cubin"])
    return {
        "kernel": kernel.metadata.name,
        "fp8_wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*\.f32\.(e\dm\d\.e\dm\d)", ptx))),
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        "tma_stores": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", ptx)),
        "fused": len(re.findall(r"\bFFMA\b", sass)),
        "products": len(re.findall(r"\bQGMMA\b", sass)),
        "local_loads": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "highest_register": max(int(number) for number in re.findall(r"\bR(\d+)\b", sass)),
        "shared": kernel.metadata.shared,
        "scratch": kernel.metadata.global_scratch_size,
        "serialised": serialised(ptx),
        "waits": ptx.count(WAIT),
        "lets_start": ptx.count("griddepcontrol.launch_dependents"),
        "before_wait": before(WAIT, ptx, PTX_ACCESS),
        "before_wait_assembled": before("ACQBULK", sass, SASS_ACCESS),
        **resource_usage(kernel.asm["cubin"]),
    }


# Everything that reads or writes memory outside of the program.
PTX_ACCESS = r"\b(?:ld\.global|st\.global|atom\.|red\.|cp\.async\.bulk\.tensor)\S*"
SASS_ACCESS = r"\b(?:LDG|STG|ATOM|ATOMG|RED|REDG|UTMALDG|UTMASTG|LDGSTS|LD|ST)\b(?:\.\S+)?"


WAIT = "griddepcontrol.wait"


def before(wait: str, code: str, pattern: str) -> list[str] | None:
    """Accesses to global memory in front of the wait, in their order; None without a wait."""
    front, found, _ = code.partition(wait)
    return re.findall(pattern, front) if found else None


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = NVIDIA_TOOLS / "nvdisasm"
        return subprocess.run(
            [tool, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def serialised(ptx: str) -> bool:
    """Whether the newer of Triton's assemblers says that it makes every WGMMA wait (C7514)."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        told = subprocess.run(
            [
                NVIDIA_TOOLS / "ptxas-blackwell",
                "-v",
                "--gpu-name=sm_90a",
                file.name,
                "-o",
                "/dev/null",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    return "C7514" in told.stdout + told.stderr or "serializ" in told.stdout + told.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="also the rarer variants")
    parser.add_argument("--dump", type=Path, help="write ptx and cubin here")
    arguments = parser.parse_args()
    recorder = Recorder()
    recorder.install()
    report: dict[str, dict[str, Any]] = {}
    for name, run in (VARIANTS | (MORE if arguments.all else {})).items():
        config = run()
        report[name] = {"config": str(config), **facts(recorder.compiled)}
        if arguments.dump:
            for kind in ("ptx", "cubin"):
                content = recorder.compiled.asm[kind]
                place = arguments.dump / f"{name}.{kind}"
                place.write_bytes(content if isinstance(content, bytes) else content.encode())
    report["triton"] = {"version": triton.__version__}
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    assert H200.shared_memory == hopper_config.SHARED_MEMORY
    main()
