"""The offset codec: its bytes as specified, its errors, and its distance from real FP8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fp8dispatch
from fp8dispatch import offset8
from fp8dispatch.errors import (
    DeviceError,
    DTypeError,
    InvalidInputError,
    NumericalOverflowError,
    ScaleValueError,
    ShapeError,
)
from fp8dispatch.formats import ACTIVATION_DTYPES
from fp8dispatch.offset8 import (
    FP8Format,
    compare_to_baseline,
    dequantize_fp8,
    fp8_gemm,
    quantize_fp8,
    quantize_fp8_with_overflow_handling,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
ONE = torch.ones(())


def one(value: float, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(value, device=device)


def test_codes_as_the_formula_gives_them(device: str) -> None:
    step = 448 / 127
    values = [0, 448, -448, step, -step, 0.5 * step, 1.5 * step, -0.5 * step, 1000, -1000]
    codes, scale = quantize_fp8(torch.tensor(values, device=device), one(1.0, device))

    # Halves go to the even step, and what lies beyond 448 is clamped.
    assert codes.tolist() == [128, 255, 1, 129, 127, 128, 130, 128, 255, 1]
    assert codes.dtype == torch.uint8
    assert float(scale) == 1.0
    restored = dequantize_fp8(codes[:5], scale, torch.float32)
    torch.testing.assert_close(restored.cpu(), torch.tensor(values[:5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_scale_is_448_over_amax_and_zeros_have_scale_one(
    dtype: torch.dtype, device: str
) -> None:
    tensor = torch.tensor([0.5, -7.0, 2.0], dtype=dtype, device=device)
    codes, scale = quantize_fp8(tensor)
    assert (float(scale), scale.dtype, scale.shape) == (64.0, torch.float32, ())
    assert codes.tolist() == [137, 1, 164]

    zeros, scale = quantize_fp8(torch.zeros(3, dtype=dtype, device=device))
    assert float(scale) == 1.0
    assert dequantize_fp8(zeros, scale).tolist() == [0, 0, 0]


def test_an_empty_tensor_gives_no_codes_and_scale_one() -> None:
    codes, scale = quantize_fp8(torch.empty(0, 4))
    assert (codes.shape, float(scale)) == ((0, 4), 1.0)
    assert quantize_fp8(torch.empty(0), ONE)[0].shape == (0,)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    scale=st.one_of(st.none(), st.floats(2.0**-10, 2.0**10, width=32)),
)
def test_codes_equal_an_independent_float64_codec(values: list[float], scale: float | None) -> None:
    tensor = torch.tensor(values)
    codes, used = quantize_fp8(tensor, None if scale is None else one(scale))

    exact = (tensor.double() * used.double()).clamp(-448, 448) / 448 * 127
    # fp32 arithmetic may fall on the other side of a tie, never further.
    assert bool(((codes.double() - 128 - exact).abs() <= 0.5 + 1e-4).all())
    assert bool((codes >= 1).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out", FLOATS, ids=str)
def test_a_round_trip_is_within_half_a_step(
    dtype: torch.dtype, out: torch.dtype, device: str
) -> None:
    tensor = torch.randn(64, 33, device=device).mul(10).to(dtype).t()  # any strides
    codes, scale = quantize_fp8(tensor)
    restored = dequantize_fp8(codes, scale, out)

    assert (restored.shape, restored.dtype) == (tensor.shape, out)
    half_step = 448 / 127 / float(scale) / 2
    rounding = torch.finfo(out).eps * float(tensor.float().abs().max())
    assert float((restored.float() - tensor.float()).abs().max()) <= half_step * 1.001 + rounding


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(33, 70, 45), (1, 1, 1), (64, 256, 32)], ids=str)
def test_gemm_equals_the_product_of_the_restored_values(
    shape: tuple[int, int, int], out: torch.dtype, device: str
) -> None:
    m, k, n = shape
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device) * 0.02
    a_codes, a_scale = quantize_fp8(a)
    b_codes, b_scale = quantize_fp8(b)
    result = fp8_gemm(a_codes, b_codes, a_scale, b_scale, out)

    wide_a = (a_codes.double() - 128) / 127 * 448 / a_scale.double()
    wide_b = (b_codes.double() - 128) / 127 * 448 / b_scale.double()
    bound = torch.finfo(out).eps * (wide_a @ wide_b).abs() + 1e-5 * (wide_a.abs() @ wide_b.abs())
    assert result.dtype == out
    assert bool(((result.double() - wide_a @ wide_b).abs() <= bound + 1e-7).all())
    assert torch.equal(fp8_gemm(a, b, output_dtype=out), result), "floats are quantised on the way"


def test_gemm_uses_a_scale_that_is_given_with_floats() -> None:
    a, b = torch.randn(4, 8), torch.randn(8, 3)
    coarse = fp8_gemm(a, b, a_scale=one(1.0), output_dtype=torch.float32)
    codes = quantize_fp8(a, one(1.0))
    expected = fp8_gemm(codes[0], b, codes[1], output_dtype=torch.float32)
    assert torch.equal(coarse, expected)
    assert not torch.equal(coarse, fp8_gemm(a, b, output_dtype=torch.float32))


@pytest.mark.parametrize(("halvings", "fits"), [(0, True), (1, True), (3, True), (4, False)])
def test_overflow_handling_survives_as_many_halvings_as_it_is_given(
    halvings: int, fits: bool
) -> None:
    tensor = torch.tensor([-3.5, 1.0])
    scale = one(128.0 * 2**halvings)
    if fits:
        codes, used = quantize_fp8_with_overflow_handling(tensor, scale, max_attempts=3)
        assert float(used) == 128.0
        assert torch.equal(codes, quantize_fp8(tensor, one(128.0))[0])
        return
    with pytest.raises(NumericalOverflowError, match=r"amax 3\.5 with scale 256 after 3") as caught:
        quantize_fp8_with_overflow_handling(tensor, scale, max_attempts=3)
    error = caught.value
    assert (error.max_value, error.scale, error.attempts) == (3.5, 256.0, 3)


def test_overflow_is_judged_in_fp32() -> None:
    """In bf16 this product with its own scale rounds above 448: a halving would be needless."""
    tensor = torch.tensor([1.1171875], dtype=torch.bfloat16)
    assert FP8Format.is_in_range(tensor, FP8Format.compute_scale(tensor))
    assert not FP8Format.is_in_range(tensor.half(), one(402.0))


def test_format_limits_and_scales() -> None:
    assert (FP8Format.max_value, FP8Format.min_normal) == (448.0, 2.0**-6)
    assert (FP8Format.exponent_bits, FP8Format.mantissa_bits) == (4, 3)
    assert FP8Format is fp8dispatch.FP8Format
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=torch.bfloat16)
    assert float(FP8Format.compute_scale(weight)) == 224.0
    per_output = FP8Format.compute_scale_per_channel(weight, dim=1)
    assert per_output.tolist() == [[224.0], [448.0]], "a channel of zeros has amax 1"
    assert per_output.dtype == torch.float32
    assert FP8Format.compute_scale_per_channel(weight).shape == (1, 2)


def test_errors_against_a_baseline() -> None:
    found = compare_to_baseline(torch.tensor([1.0, 2.2, 0.5]), torch.tensor([1.0, 2.0, 0.0]))
    assert found.max_error == pytest.approx(0.5)
    assert found.mean_error == pytest.approx(0.7 / 3)
    assert found.relative_error == pytest.approx(0.05), "zeros of the baseline do not count"
    assert compare_to_baseline(torch.ones(2), torch.zeros(2)).relative_error == 0


def test_every_code_decodes_to_its_step(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    restored = dequantize_fp8(codes, one(2.0, device), torch.float32).cpu().double()

    exact = (torch.arange(256).double() - 128) / 127 * 448 / 2
    torch.testing.assert_close(restored, exact, rtol=1e-6, atol=0)
    assert restored[0] == pytest.approx(-451.5 / 2, abs=0.02), "a code that is never made"
    again, _ = quantize_fp8(restored[1:].float().to(device), one(2.0, device))
    assert torch.equal(again, codes[1:])


def test_the_scale_is_the_ieee_quotient(device: str) -> None:
    amax = torch.rand(500, device=device) + 0.5
    exact = (448 / amax.double()).float()
    reciprocal = 448 * (1 / amax)
    assert not torch.equal(exact, reciprocal), "this data tells them apart"

    scales = torch.stack([FP8Format.compute_scale(value) for value in amax])
    assert torch.equal(scales, exact)
    assert torch.equal(FP8Format.compute_scale_per_channel(amax[:, None], dim=1)[:, 0], exact)


def test_a_round_trip_is_as_close_as_the_codecs_origin_promises(device: str) -> None:
    x = torch.randn(32, 32, device=device) * 10
    x[0] = 0
    restored = dequantize_fp8(*quantize_fp8(x), torch.float32)

    relative = ((restored - x).abs() / x.abs())[1:]
    assert float((relative < 0.15).float().mean()) > 0.95
    assert not restored[0].any(), "zeros stay zero"
    small = torch.tensor([1e-4, -1e-4, 5e-5], device=device)
    assert torch.equal(dequantize_fp8(*quantize_fp8(small)).sign().float(), small.sign())


def test_the_product_is_within_5_percent_of_the_fp16_baseline(device: str) -> None:
    a = (torch.randn(96, 200, device=device) * 0.02).half()
    b = (torch.randn(200, 72, device=device) * 0.02).half()
    baseline = a.float() @ b.float()

    found = compare_to_baseline(fp8_gemm(a, b, output_dtype=torch.float32), baseline)

    assert found.mean_error < 0.05 * float(baseline.abs().mean())


def test_infinities_saturate_on_request_and_nan_never() -> None:
    values = torch.tensor([torch.inf, -torch.inf, 3.5, -1.0])
    codes, scale = quantize_fp8(values, nonfinite="saturate")

    assert float(scale) == 128.0, "from the finite values"
    assert codes.tolist() == [255, 1, 255, quantize_fp8(values[2:])[0][1]]
    assert quantize_fp8(values, one(1.0), nonfinite="saturate")[0].tolist()[:2] == [255, 1]
    with pytest.raises(NumericalOverflowError, match="NaN"):
        quantize_fp8(torch.tensor([torch.nan]), nonfinite="saturate")
    with pytest.raises(InvalidInputError, match="nonfinite"):
        quantize_fp8(values, nonfinite="ignore")


def test_the_errors_are_ours_under_their_names_of_origin() -> None:
    for name, error in {
        "TritonKernelError": fp8dispatch.FP8DispatchError,
        "ShapeMismatchError": ShapeError,
        "UnsupportedDtypeError": DTypeError,
        "DeviceError": DeviceError,
        "NumericalOverflowError": NumericalOverflowError,
    }.items():
        assert issubclass(getattr(offset8, name), error)
        assert issubclass(getattr(offset8, name), offset8.TritonKernelError)


@pytest.mark.parametrize(
    ("call", "error", "attributes"),
    [
        (
            lambda: quantize_fp8(torch.ones(2).double()),
            "UnsupportedDtypeError",
            {
                "dtype": torch.float64,
                "supported_dtypes": ACTIVATION_DTYPES,
                "tensor_name": "tensor",
            },
        ),
        (
            lambda: dequantize_fp8(torch.ones(2), ONE),
            "UnsupportedDtypeError",
            {"dtype": torch.float32, "supported_dtypes": (torch.uint8,), "tensor_name": "tensor"},
        ),
        (
            lambda: quantize_fp8(torch.ones(2), ONE.half()),
            "UnsupportedDtypeError",
            {"dtype": torch.half, "supported_dtypes": (torch.float32,), "tensor_name": "scale"},
        ),
        (
            lambda: quantize_fp8(torch.ones(2), torch.ones(2)),
            "ShapeMismatchError",
            {"expected": (), "actual": (2,), "tensor_name": "scale"},
        ),
        (
            lambda: fp8_gemm(torch.ones(2, 3), torch.ones(4, 5)),
            "ShapeMismatchError",
            {"expected": (3, 5), "actual": (4, 5), "tensor_name": "b"},
        ),
        (
            lambda: quantize_fp8(torch.ones(2), ONE.to("meta")),
            "DeviceError",
            {"expected_device": "cpu", "actual_device": "meta", "tensor_name": "scale"},
        ),
        (
            lambda: fp8_gemm(torch.ones(2, 2), torch.ones(2, 2, device="meta")),
            "DeviceError",
            {"expected_device": "cpu", "actual_device": "meta", "tensor_name": "b"},
        ),
    ],
)
def test_errors_carry_the_attributes_of_origin(
    call: Callable[[], object], error: str, attributes: dict[str, object]
) -> None:
    with pytest.raises(getattr(offset8, error)) as caught:
        call()

    assert {name: getattr(caught.value, name) for name in attributes} == attributes


def test_its_codes_are_no_fp8_bytes() -> None:
    tensor = torch.tensor([1.0, 2.0, -4.0])
    codes, _ = quantize_fp8(tensor, ONE)
    real = tensor.to(torch.float8_e4m3fn).view(torch.uint8)
    assert not torch.equal(codes, real)
    for name in ("quantize_fp8", "dequantize_fp8", "fp8_gemm", "compare_to_baseline"):
        assert not hasattr(fp8dispatch, name), "the root's quantize is real FP8"
    assert not hasattr(fp8dispatch, "quantize_fp8_with_overflow_handling")


FP8 = torch.ones(2, 2).to(torch.float8_e4m3fn)
X, CODES = torch.ones(2, 2), torch.full((2, 2), 129, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantize_fp8(FP8), DTypeError, "FP8 bytes are no offset codes"),
        (lambda: dequantize_fp8(FP8, ONE), DTypeError, "FP8 bytes are no offset codes"),
        (lambda: fp8_gemm(FP8, X), DTypeError, "FP8 bytes are no offset codes"),
        (lambda: quantize_fp8(X.double()), DTypeError, "found float64"),
        (lambda: quantize_fp8([1.0]), DTypeError, "found list"),
        (lambda: dequantize_fp8(X, ONE), DTypeError, "make codes with quantize_fp8"),
        (lambda: quantize_fp8(X, ONE.double()), DTypeError, "scale must be float32"),
        (lambda: quantize_fp8(X, torch.ones(2)), ShapeError, "one scale per tensor"),
        (lambda: quantize_fp8(X, -ONE), ScaleValueError, "found -1.0"),
        (lambda: quantize_fp8(X, ONE * 0), ScaleValueError, "found 0.0"),
        (lambda: quantize_fp8(X, ONE * torch.nan), ScaleValueError, "found nan"),
        (lambda: quantize_fp8(X, ONE.to("meta")), DeviceError, "found meta"),
        (lambda: quantize_fp8(X * torch.inf), NumericalOverflowError, "NaN or infinity"),
        (lambda: quantize_fp8(X * torch.nan, ONE), NumericalOverflowError, "NaN or infinity"),
        (lambda: dequantize_fp8(CODES, ONE, torch.float64), DTypeError, "output_dtype"),
        (lambda: fp8_gemm(CODES, X), InvalidInputError, "a_scale must be given"),
        (lambda: fp8_gemm(X, CODES, None, torch.ones(2)), ShapeError, "b_scale must have one"),
        (lambda: fp8_gemm(X, torch.ones(3, 2)), ShapeError, r"pass a weight \[N, K\] as weight.t"),
        (lambda: fp8_gemm(X[0], X), ShapeError, "a must be a matrix"),
        (lambda: fp8_gemm(X, X.to("meta")), DeviceError, "found meta"),
        (lambda: fp8_gemm(X, X, output_dtype="half"), DTypeError, "found 'half'"),
        (lambda: FP8Format.compute_scale_per_channel(X, 2), ShapeError, "a dimension 2"),
        (lambda: compare_to_baseline(X, X[0]), ShapeError, "one shape"),
        (lambda: quantize_fp8_with_overflow_handling(X, ONE, 0), ShapeError, "max_attempts"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_the_public_names_are_documented() -> None:
    for name in ("quantize_fp8", "dequantize_fp8", "fp8_gemm", "FP8Format", "compare_to_baseline"):
        assert getattr(offset8, name).__doc__
