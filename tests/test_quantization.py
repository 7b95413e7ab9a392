"""`quantize`, `dequantize` and the formats, against arithmetic written out here in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fp8dispatch import (
    DTypeError,
    NumericalOverflowError,
    QuantizedActivation,
    ScaleValueError,
    ShapeError,
    dequantize,
    quantize,
)
from fp8dispatch.formats import (
    ACTIVATION_DTYPES,
    FLOAT8_DTYPES,
    SCALE_DTYPES,
    activation_float8,
    cast,
    decode_e8m0,
    decode_scale,
    dtype_name,
    max_value,
    round_scale,
)
from fp8dispatch.quantization.activation import quantize_activation
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.float8_tables import (
    E4M3,
    E4M3_FNUZ,
    E5M2,
    E5M2_FNUZ,
    LAYOUTS,
    finite_codes,
    nearest_even,
)
from tests.oracle import RECIPES

N, K = 200, 300
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
every_format = pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=dtype_name)
every_scale = pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=dtype_name)


@every_format
def test_the_formats_are_what_their_tables_say(dtype: torch.dtype) -> None:
    _, _, _, largest, nans, infinities = LAYOUTS[dtype]
    decoded = torch.arange(256, dtype=torch.uint8).view(dtype).double()

    assert max_value(dtype) == largest == max(finite_codes(dtype).values())
    assert {code for code in range(256) if math.isnan(decoded[code])} == nans
    assert {code for code in range(256) if math.isinf(decoded[code])} == infinities
    assert {code: float(decoded[code]) for code in finite_codes(dtype)} == finite_codes(dtype)


def test_activations_are_e4m3_of_the_weights_family() -> None:
    paired = {dtype: activation_float8(dtype) for dtype in FLOAT8_DTYPES}

    assert paired == {E4M3: E4M3, E5M2: E4M3, E4M3_FNUZ: E4M3_FNUZ, E5M2_FNUZ: E4M3_FNUZ}
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"


@every_format
def test_the_cast_clamps_and_then_rounds_to_nearest_even(dtype: torch.dtype, device: str) -> None:
    points = torch.tensor(sorted({abs(value) for value in finite_codes(dtype).values()}))
    ties = (points[1:] + points[:-1]) / 2  # exact in fp32
    limit = points[-1:]
    values = torch.cat(
        [
            *(points, ties, torch.nextafter(ties, limit), torch.nextafter(ties, -limit)),
            *(limit * 1.06, limit * 2, torch.tensor([3.4e38, 1e-30])),
            torch.exp2(torch.rand(10_000) * 40 - 22),
        ]
    )
    values = torch.cat([values, -values])

    data = cast(values.to(device), dtype)

    assert torch.equal(data.view(torch.uint8).cpu().long(), nearest_even(values.double(), dtype))
    nan = cast(torch.tensor([torch.nan], device=device), dtype)
    assert bool(nan.float().isnan())


@every_format
@every_scale
@every_recipe
def test_quantize_is_division_clamp_and_rounding(
    recipe: Recipe, scale_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    # Magnitudes far enough apart to reach subnormal codes.
    values = torch.randn(N, K) * torch.logspace(-3, 2, K)
    values[:, 3] = 0
    rows, columns = oracle.block_of(recipe, N, K)

    data, scale = quantize(values.to(device), recipe, dtype=dtype, scale_dtype=scale_dtype)

    assert (data.shape, data.dtype) == (values.shape, dtype)
    assert scale.dtype == scale_dtype
    assert scale.shape == recipe.scale_shape(N, K)
    row_of, column_of = torch.arange(N) // rows, torch.arange(K) // columns
    grid = torch.zeros(-(-N // rows), -(-K // columns))
    cells = row_of[:, None] * grid.shape[1] + column_of
    amax = grid.view(-1).scatter_reduce(0, cells.reshape(-1), values.abs().reshape(-1), "amax")
    exact = amax.double() / LAYOUTS[dtype][3]
    stored = decode_scale(scale).double().cpu().reshape(-1)
    if scale_dtype == torch.float32:
        assert torch.equal(stored, exact.float().double())
    elif scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
        assert torch.equal(stored, torch.exp2(torch.ceil(torch.log2(exact.float().double()))))
    else:
        floored = exact.float().clamp(min=torch.finfo(scale_dtype).tiny)
        assert torch.equal(stored, floored.to(scale_dtype).double())
    quotient = (values / stored.float()[cells]).double()  # one IEEE division, in fp32
    assert torch.equal(
        data.view(torch.uint8).cpu().long(), nearest_even(quotient.reshape(-1), dtype).view(N, K)
    )


def test_the_division_is_ieee(device: str) -> None:
    """Values whose quotient is a tie: a product with the reciprocal falls to either side of it."""
    ties = (torch.arange(8.0, 16.0) + 0.5) * 2
    amax = torch.rand(500, 1) + 0.5
    values = torch.cat([amax, ties * (amax / 448)], 1)
    quotient = values / (amax / 448)
    assert (quotient[:, 1:] == ties).float().mean() > 0.5
    expected = nearest_even(quotient.double().reshape(-1), E4M3).view(values.shape)

    data, _ = quantize(values.to(device), "row")
    activations = QuantizedActivation.from_tensor(values.to(device))

    assert torch.equal(data.view(torch.uint8).cpu().long(), expected)
    assert torch.equal(activations.data.view(torch.uint8).cpu().long(), expected)


@every_recipe
def test_zeros_take_the_scale_one_and_a_tiny_amax_the_floor(recipe: Recipe, device: str) -> None:
    zeros, ones = quantize(torch.zeros(N, K, device=device), recipe)
    tiny, floor = quantize(torch.full((N, K), 1e-20, device=device), recipe)

    assert not zeros.view(torch.uint8).any()
    assert torch.equal(ones, torch.ones_like(ones))
    expected = torch.tensor(1e-12, dtype=torch.float32) / 448
    assert torch.equal(floor, torch.full_like(floor, expected.item()))
    assert not tiny.view(torch.uint8).any()
    assert torch.equal(
        dequantize(zeros, ones, block_size=recipe.block_size), torch.zeros_like(zeros).bfloat16()
    )


def test_a_block_of_zeros_beside_others(device: str) -> None:
    values = torch.randn(256, 256, device=device)
    values[:128, 128:] = 0

    data, scale = quantize(values)

    assert scale[0, 1] == 1
    assert (scale[0, 0] < 1) & (scale[1] < 1).all()
    assert not dequantize(data, scale)[:128, 128:].any()


def test_e8m0_decodes_every_byte() -> None:
    codes = torch.arange(256, dtype=torch.uint8)

    for raw in (codes, codes.view(torch.float8_e8m0fnu)):
        decoded = decode_e8m0(raw)
        assert decoded.dtype == torch.float32
        assert torch.equal(
            decoded[:255].double(), torch.exp2(torch.arange(255, dtype=torch.float64) - 127)
        )
        assert bool(decoded[255].isnan())
    assert decode_e8m0(codes)[0] == 2.0**-127
    assert decode_e8m0(codes)[254] == 2.0**127


def test_e8m0_rounds_up_and_keeps_powers_of_two() -> None:
    powers = torch.exp2(torch.arange(-126.0, 128.0))
    above = torch.nextafter(powers, torch.tensor(torch.inf))

    for dtype in (torch.uint8, torch.float8_e8m0fnu):
        assert torch.equal(decode_scale(round_scale(powers, dtype)), powers)
        assert torch.equal(decode_scale(round_scale(above[:-1], dtype)), powers[1:])
    subnormal = round_scale(torch.tensor([2.0**-140, 2.0**-127]), torch.uint8)
    assert subnormal.tolist() == [0, 0]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_a_small_scale_never_becomes_zero(scale_dtype: torch.dtype) -> None:
    values = torch.full((4, 4), 1e-6)  # divided by 57344 this is below fp16's smallest value

    data, scale = quantize(values, "tensor", dtype=E5M2, scale_dtype=scale_dtype)

    assert scale.item() >= torch.finfo(scale_dtype).tiny
    restored = dequantize(data, scale, dtype=torch.float32)
    torch.testing.assert_close(restored, values, rtol=0.13, atol=0)


@every_recipe
@every_scale
@pytest.mark.parametrize("x_dtype", ACTIVATION_DTYPES, ids=dtype_name)
def test_normal_data_keeps_31_decibels(
    recipe: Recipe, scale_dtype: torch.dtype, x_dtype: torch.dtype, device: str
) -> None:
    values = (torch.randn(N, K, device=device) * 0.05).to(x_dtype)

    data, scale = quantize(values, recipe, scale_dtype=scale_dtype)
    restored = dequantize(data, scale, block_size=recipe.block_size, dtype=torch.float32)

    ratio = oracle.sqnr(restored.reshape(1, -1), values.reshape(1, -1)).item()
    assert ratio >= 31, f"{ratio:.1f} dB"


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_activations_keep_31_decibels(group_size: int | None, device: str) -> None:
    x = torch.randn(50, K, device=device, dtype=torch.bfloat16)

    quantized = QuantizedActivation.from_tensor(x, group_size=group_size)

    groups = group_size or K
    assert quantized.scale.shape == (50, -(-K // groups))
    spread = quantized.scale[:, torch.arange(K, device=device) // groups]
    ratio = oracle.sqnr((quantized.data.float() * spread).reshape(1, -1), x.reshape(1, -1))
    assert ratio.item() >= 31


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("group_size", [32, 100, K])
def test_padding_rows_are_zeros_with_scale_one(group_size: int, static: bool, device: str) -> None:
    x = torch.randn(5, K, device=device)
    scale = torch.full((1,), 0.01, device=device) if static else None

    plain = quantize_activation(x, group_size, E4M3, scale)
    padded = quantize_activation(x, group_size, E4M3, scale, pad_rows_to=4)

    assert padded.data.shape == (8, K)
    assert torch.equal(padded.data[:5].view(torch.uint8), plain.data.view(torch.uint8))
    assert not padded.data[5:].view(torch.uint8).any()
    if not static:
        assert torch.equal(padded.scale[:5], plain.scale)
        assert torch.equal(padded.scale[5:], torch.ones_like(padded.scale[5:]))
        assert padded.scale.stride() == (1, 8)


@every_recipe
@every_format
@pytest.mark.parametrize("out_dtype", ACTIVATION_DTYPES, ids=dtype_name)
def test_dequantize_multiplies_and_rounds_once(
    recipe: Recipe, dtype: torch.dtype, out_dtype: torch.dtype, device: str
) -> None:
    data, scale = oracle.make_weight(N, K, recipe, dtype=dtype, device=device)
    strided = data.t().contiguous().t()

    for view in (data, strided):
        restored = dequantize(view, scale, block_size=recipe.block_size, dtype=out_dtype)

        exact = oracle.dequantized_weight(data, scale, recipe)
        assert restored.dtype == out_dtype
        # A float64 product of FP8 and fp32 is exact; rounding it to fp32 first is what GPUs do.
        assert torch.equal(restored, exact.float().to(out_dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_recipe
def test_values_that_are_not_finite_are_refused(recipe: Recipe, value: float, device: str) -> None:
    values = torch.randn(N, K, device=device)
    values[150, 299] = value

    with pytest.raises(NumericalOverflowError, match="NaN or infinity"):
        quantize(values, recipe)


def test_a_scale_that_leaves_its_dtype_is_refused() -> None:
    with pytest.raises(NumericalOverflowError, match="float16"):
        quantize(torch.full((4, 4), 1e30), "row", scale_dtype=torch.float16)
    assert quantize(torch.full((4, 4), 1e30), "row")[1].isfinite().all()


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_dequantize_refuses_impossible_scales(value: float) -> None:
    data, scale = quantize(torch.randn(N, K))
    scale[1, 2] = value

    with pytest.raises(ScaleValueError, match="1 of 6 values"):
        dequantize(data, scale)


def test_wrong_arguments_are_refused_in_a_sentence() -> None:
    matrix = torch.randn(N, K)
    data, scale = quantize(matrix)

    with pytest.raises(DTypeError, match="tensor must be"):
        quantize(matrix.double())
    with pytest.raises(ShapeError, match="matrix"):
        quantize(matrix[0])
    with pytest.raises(ShapeError, match="empty"):
        quantize(matrix[:0])
    with pytest.raises(DTypeError, match="scale_dtype"):
        quantize(matrix, scale_dtype=torch.float64)
    with pytest.raises(DTypeError, match="data must be"):
        dequantize(matrix, scale)
    with pytest.raises(ShapeError, match="scale for a data"):
        dequantize(data, scale[:1])
