"""The GPU writes the bytes that the CPU writes: every quantiser, format and kind of scale."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch import pack_to_fp8_e4m3, quantize
from fp8dispatch.formats import (
    ACTIVATION_DTYPES,
    FLOAT8_DTYPES,
    SCALE_DTYPES,
    decode,
    dtype_name,
    encode,
)
from fp8dispatch.offset8 import FP8Format, dequantize_fp8, quantize_fp8
from fp8dispatch.quantization import dynamic
from fp8dispatch.quantization.fnuz import convert_to_fnuz
from fp8dispatch.quantization.kv_cache import quantize_kv
from fp8dispatch.recipe import Recipe
from tests.oracle import RECIPES

pytestmark = pytest.mark.gpu

N, K = 333, 1030

every_format = pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=dtype_name)
every_source = pytest.mark.parametrize("source", ACTIVATION_DTYPES, ids=dtype_name)


def sample(rows: int = N, columns: int = K) -> torch.Tensor:
    """Values over many magnitudes, among them zeros and a row of zeros."""
    values = torch.randn(rows, columns) * torch.logspace(-6, 3, columns)
    values[:, ::17] = 0
    values[rows // 2] = 0
    return values


def assert_same(on_cpu: torch.Tensor, on_gpu: torch.Tensor) -> None:
    assert on_gpu.is_cuda
    assert on_cpu.dtype == on_gpu.dtype
    assert on_cpu.shape == on_gpu.shape
    a, b = on_cpu.reshape(-1).view(torch.uint8), on_gpu.cpu().reshape(-1).view(torch.uint8)
    assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} bytes differ"


@every_format
@every_source
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_weights(
    recipe: Recipe, scale_dtype: torch.dtype, source: torch.dtype, dtype: torch.dtype
) -> None:
    values = sample().to(source)
    options = {"dtype": dtype, "scale_dtype": scale_dtype}

    on_cpu = quantize(values, recipe, **options)  # type: ignore[arg-type]
    on_gpu = quantize(values.cuda(), recipe, **options)  # type: ignore[arg-type]

    assert_same(on_cpu[0], on_gpu[0])
    assert_same(on_cpu[1], on_gpu[1])


@every_format
@every_source
@pytest.mark.parametrize("group", [32, 64, 128, K])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_activations_of_the_kernels(
    static: bool, group: int, source: torch.dtype, dtype: torch.dtype
) -> None:
    x = sample().to(source)
    scale = torch.tensor([0.0123]) if static else None

    on_cpu = dynamic.quantize_eager(x, group, dtype, scale)
    on_gpu = dynamic.quantize(
        x.cuda(), group, dtype, None if scale is None else scale.cuda(), use_kernels=True
    )

    assert_same(on_cpu[0], on_gpu[0])
    assert_same(on_cpu[1], on_gpu[1])


@every_format
@every_source
def test_raw_bytes(source: torch.dtype, dtype: torch.dtype) -> None:
    values = torch.cat([sample().flatten(), torch.tensor([torch.inf, -torch.inf, torch.nan])])
    values = values.to(source)

    codes = encode(values, dtype, nonfinite="saturate")
    assert_same(codes, encode(values.cuda(), dtype, nonfinite="saturate"))
    everything = torch.arange(256, dtype=torch.uint8)
    on_cpu, on_gpu = decode(everything, dtype), decode(everything.cuda(), dtype).cpu()
    assert torch.equal(on_cpu.isnan(), on_gpu.isnan())
    assert torch.equal(on_cpu.nan_to_num(), on_gpu.nan_to_num())


def test_e8m0_bytes() -> None:
    values = torch.cat([sample().abs().flatten(), torch.tensor([2.0**-140, 3e38])])
    values = values[values > 0]
    assert_same(encode(values, torch.float8_e8m0fnu), encode(values.cuda(), torch.float8_e8m0fnu))


@every_source
@pytest.mark.parametrize("group", [10, 515])
def test_packed_groups(group: int, source: torch.dtype) -> None:
    x = sample().to(source)
    on_cpu, on_gpu = pack_to_fp8_e4m3(x, group), pack_to_fp8_e4m3(x.cuda(), group)
    assert_same(on_cpu[0], on_gpu[0])
    assert_same(on_cpu[1], on_gpu[1])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=dtype_name)
def test_fnuz(dtype: torch.dtype) -> None:
    data, scale = quantize(sample(), dtype=dtype)
    on_cpu, on_gpu = convert_to_fnuz(data, scale), convert_to_fnuz(data.cuda(), scale.cuda())
    assert_same(on_cpu[0], on_gpu[0])
    assert_same(on_cpu[1], on_gpu[1])


@every_source
@pytest.mark.parametrize("scale", [None, 0.37], ids=["computed", "given"])
def test_offset_codes(scale: float | None, source: torch.dtype) -> None:
    values = sample().to(source)
    given = None if scale is None else torch.tensor(scale)
    codes, used = quantize_fp8(values, given)
    on_gpu = quantize_fp8(values.cuda(), None if given is None else given.cuda())
    assert_same(codes, on_gpu[0])
    assert_same(used, on_gpu[1])
    restored = dequantize_fp8(codes, used, torch.float32)
    assert_same(restored, dequantize_fp8(*on_gpu, torch.float32))
    per_channel = FP8Format.compute_scale_per_channel(values, dim=1)
    assert_same(per_channel, FP8Format.compute_scale_per_channel(values.cuda(), dim=1))


@every_format
@every_source
@pytest.mark.parametrize("per_head", [False, True], ids=["layer", "head"])
def test_kv_cache(per_head: bool, source: torch.dtype, dtype: torch.dtype) -> None:
    states = sample(60, 64).reshape(2, 3, 10, 64).to(source)
    scale = torch.tensor([0.1, 0.7, 3.3] if per_head else [0.3])
    assert_same(quantize_kv(states, scale, dtype), quantize_kv(states.cuda(), scale.cuda(), dtype))
