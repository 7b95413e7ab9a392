"""FP8 codes in integer arithmetic equal torch's conversions, code by code and tie by tie."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fp8dispatch.formats import FLOAT8_DTYPES, max_value
from fp8dispatch.kernels import float8
from fp8dispatch.kernels.float8 import (
    EXPONENT_BIAS,
    FORMAT_CODES,
    MANTISSA_BITS,
    NATIVE,
    decode_float8,
    encode_float8,
    kernel_operand,
    native_float8,
)
from fp8dispatch.kernels.interpreter import INTERPRETED

BLOCK = 8192
every_format = pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=str)


@triton.jit
def decode_kernel(codes, values, FORMAT: tl.constexpr):
    places = tl.arange(0, 256)
    tl.store(values + places, decode_float8(tl.load(codes + places), FORMAT))


@triton.jit
def encode_kernel(values, codes, count, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + places, mask=places < count, other=0.0)
    tl.store(codes + places, encode_float8(value, FORMAT), mask=places < count)


def encode(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    grid = (triton.cdiv(values.numel(), BLOCK),)
    encode_kernel[grid](values, codes, values.numel(), FORMAT=FORMAT_CODES[dtype], BLOCK=BLOCK)
    return codes


def all_codes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8)


@every_format
def test_all_codes_decode_to_their_values(dtype: torch.dtype, device: str) -> None:
    values = torch.empty(256, dtype=torch.float16, device=device)

    decode_kernel[(1,)](all_codes().to(device), values, FORMAT=FORMAT_CODES[dtype])

    expected = all_codes().view(dtype).float()
    decoded = values.cpu().float()
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    number = ~expected.isnan()
    assert torch.equal(decoded[number].signbit(), expected[number].signbit())


@every_format
def test_all_values_encode_to_their_codes(dtype: torch.dtype, device: str) -> None:
    values = all_codes().view(dtype).float()
    finite = values.isfinite()

    codes = encode(values[finite].to(device), dtype)

    assert torch.equal(codes.cpu(), all_codes()[finite])


@every_format
def test_ties_and_their_neighbours_round_as_torch_does(dtype: torch.dtype, device: str) -> None:
    values = all_codes().view(dtype).float()
    values = values[values.isfinite()].sort().values
    ties = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    around = torch.cat([ties, ties.nextafter(infinity), ties.nextafter(-infinity)])

    codes = encode(around.to(device), dtype)

    assert torch.equal(codes.cpu(), around.to(dtype).view(torch.uint8))


@every_format
def test_a_sweep_of_float32_encodes_as_torch_does(dtype: torch.dtype, device: str) -> None:
    bits = torch.arange(-(2**31), 2**31, 34_511, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.isfinite()].clamp(-max_value(dtype), max_value(dtype))

    codes = encode(values.to(device), dtype)

    assert torch.equal(codes.cpu(), values.to(dtype).view(torch.uint8))


@every_format
def test_nan_encodes_to_a_nan_code_and_minus_zero_does_not(dtype: torch.dtype, device: str) -> None:
    values = torch.tensor([torch.nan, -torch.nan, -0.0, -1e-30], device=device)

    decoded = encode(values, dtype).cpu().view(dtype).float()

    assert decoded.isnan().tolist() == [True, True, False, False]
    assert decoded[2:].tolist() == [0.0, 0.0]


@every_format
def test_the_table_agrees_with_the_largest_value(dtype: torch.dtype) -> None:
    code = FORMAT_CODES[dtype]
    mantissa, bias = MANTISSA_BITS.value[code], EXPONENT_BIAS.value[code]
    mantissa = getattr(mantissa, "value", mantissa)
    bias = getattr(bias, "value", bias)

    smallest = 2.0 ** (1 - bias - mantissa)

    assert all_codes().view(dtype).float()[1].item() == smallest


def test_native_formats_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "INTERPRETED", tl.constexpr(False))
    capability = (8, 9)

    class Limits:
        pass

    def device_limits(device: torch.device) -> Limits:
        limits = Limits()
        limits.capability = capability  # type: ignore[attr-defined]
        return limits

    monkeypatch.setattr(float8, "device_limits", device_limits)
    cuda = torch.device("cuda", 0)
    ada = [native_float8(dtype, cuda) for dtype in FLOAT8_DTYPES]
    capability = (8, 6)
    ampere = [native_float8(dtype, cuda) for dtype in FLOAT8_DTYPES]

    assert ada == [torch.version.hip is None] * 2 + [False] * 2
    assert ampere == [False] * 4
    assert not native_float8(torch.float8_e4m3fn, torch.device("cpu"))


def test_the_interpreter_gets_bytes() -> None:
    tensor = torch.zeros(4, dtype=torch.uint8).view(torch.float8_e5m2)

    operand, code = kernel_operand(tensor)

    assert operand.dtype == torch.uint8
    assert operand.data_ptr() == tensor.data_ptr()
    assert code == FORMAT_CODES[torch.float8_e5m2] != NATIVE.value


def test_interpretation_is_detected(device: str) -> None:
    assert INTERPRETED.value is (device == "cpu")
