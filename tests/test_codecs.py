"""Raw bytes: `encode` and `decode`, FNUZ bytes, grouped E4M3 bytes, and the bytes of a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fp8dispatch
from fp8dispatch import (
    DTypeError,
    InvalidInputError,
    NumericalOverflowError,
    ScaleValueError,
    ShapeError,
    pack_to_fp8_e4m3,
    quantize,
)
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, decode, dtype_name, encode
from fp8dispatch.memory import (
    TensorSpec,
    compare_recipes,
    estimate_memory,
    is_linear_weight,
    scale_bytes,
)
from fp8dispatch.quantization.fnuz import convert_to_fnuz, double_scale
from fp8dispatch.recipe import Granularity, Recipe
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

E8M0 = torch.float8_e8m0fnu
ALL_CODES = torch.arange(256, dtype=torch.uint8)
NAN, INF = float("nan"), float("inf")

every_format = pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=dtype_name)


@every_format
def test_every_code_decodes_to_its_value_and_back(dtype: torch.dtype, device: str) -> None:
    _, _, _, _, nans, infinities = LAYOUTS[dtype]
    values = decode(ALL_CODES.to(device), dtype).cpu()
    finite = finite_codes(dtype)

    assert values.dtype == torch.float32
    assert {code: float(values[code]) for code in finite} == finite
    assert {code for code in range(256) if values[code].isnan()} == nans
    assert {code for code in range(256) if values[code].isinf()} == infinities
    codes = torch.tensor(sorted(finite))
    again = encode(values[codes].to(device), dtype)
    assert torch.equal(again.cpu().long(), codes)
    assert again.dtype == torch.uint8


@every_format
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1))
def test_values_are_clamped_and_rounded_to_nearest_even(
    dtype: torch.dtype, values: list[float]
) -> None:
    tensor = torch.tensor(values)

    assert torch.equal(encode(tensor, dtype).long(), nearest_even(tensor.double(), dtype))


@every_format
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_every_16_bit_value_is_encoded_right(dtype: torch.dtype, source: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(source)
    every = every[every.isfinite()]

    assert torch.equal(encode(every, dtype).long(), nearest_even(every.double(), dtype))


@every_format
def test_values_that_are_not_finite_raise_or_saturate(dtype: torch.dtype, device: str) -> None:
    values = torch.tensor([INF, -INF, NAN, -NAN, 1.0], device=device)
    values[3:4].view(torch.int32).fill_(-(2**22))  # a NaN whose sign bit is set
    assert values[3].isnan()

    for one in values[:4]:
        with pytest.raises(NumericalOverflowError, match="nonfinite='saturate'"):
            encode(one, dtype)
    codes = encode(values, dtype, nonfinite="saturate")
    largest = LAYOUTS[dtype][3]
    decoded = decode(codes, dtype)
    assert decoded[:2].tolist() == [largest, -largest]
    assert bool(decoded[2:4].isnan().all())
    assert codes[2] == codes[3] == (0x80 if "fnuz" in str(dtype) else 0x7F), "one code of NaN"


def test_e8m0_bytes_are_powers_of_two() -> None:
    values = decode(ALL_CODES, E8M0)
    exact = torch.exp2(torch.arange(255, dtype=torch.float64) - 127)

    assert torch.equal(values[:255].double(), exact)
    assert bool(values[255].isnan())
    assert torch.equal(encode(values[:255], E8M0), ALL_CODES[:255])


@given(st.floats(2.0**-140, 1.5 * 2.0**127, width=32))
def test_e8m0_rounds_up(value: float) -> None:
    byte = int(encode(torch.tensor(value), E8M0))

    assert 2.0 ** (byte - 127) >= value or byte == 254
    assert byte == 0 or 2.0 ** (byte - 128) < value


def test_e8m0_has_neither_zero_nor_sign_nor_infinity() -> None:
    for value in (0.0, -1.0):
        with pytest.raises(ScaleValueError, match="use 1 as the scale of zeros"):
            encode(torch.tensor([1.0, value]), E8M0)
    with pytest.raises(NumericalOverflowError):
        encode(torch.tensor([INF]), E8M0)
    saturated = encode(torch.tensor([INF, NAN, 1.0]), E8M0, nonfinite="saturate")
    assert saturated.tolist() == [254, 255, 127]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_quantize_saturates_on_request(recipe: Recipe, device: str) -> None:
    values = torch.randn(200, 300, device=device)
    expected, expected_scale = quantize(values, recipe)
    spoilt = values.clone()
    places = [(0, 0), (130, 290), (199, 5)]
    spoilt[places[0]], spoilt[places[1]], spoilt[places[2]] = INF, -INF, NAN
    clean = torch.where(spoilt.isfinite(), values, 0)
    expected, expected_scale = quantize(clean, recipe)

    data, scale = quantize(spoilt, recipe, nonfinite="saturate")

    assert torch.equal(scale, expected_scale), "scales come from the finite values"
    decoded = data.float()
    assert (decoded[places[0]], decoded[places[1]]) == (448, -448)
    assert data.view(torch.uint8)[places[2]] == 0x7F
    kept = spoilt.isfinite()
    assert torch.equal(data.view(torch.uint8)[kept], expected.view(torch.uint8)[kept])


@pytest.mark.parametrize(
    ("dtype", "fnuz"), [(E4M3, E4M3_FNUZ), (E5M2, E5M2_FNUZ)], ids=["e4m3", "e5m2"]
)
def test_fnuz_bytes_have_the_same_values(
    dtype: torch.dtype, fnuz: torch.dtype, device: str
) -> None:
    finite = finite_codes(dtype)
    data = torch.tensor(list(finite), dtype=torch.uint8, device=device).view(dtype)
    scale = torch.tensor([0.3], device=device)

    converted, doubled = convert_to_fnuz(data, scale)

    assert converted.dtype == fnuz
    assert float(doubled) == 2 * float(scale)
    codes = converted.view(torch.uint8).tolist()
    assert [2 * finite_codes(fnuz)[code] for code in codes] == list(finite.values())
    assert codes[list(finite).index(0x80)] == 0, "the code of negative zero would be NaN"


def test_nan_stays_nan_in_fnuz_and_an_infinity_is_refused() -> None:
    nans = torch.tensor([[0x7F, 0xFF, 0x38]], dtype=torch.uint8).view(E4M3)
    converted, _ = convert_to_fnuz(nans, torch.ones(1))
    assert converted.view(torch.uint8).tolist() == [[0x80, 0x80, 0x38]]
    assert bool(converted.float()[0, :2].isnan().all())

    with pytest.raises(NumericalOverflowError, match="no infinity"):
        convert_to_fnuz(torch.tensor([INF]).to(E5M2), torch.ones(1))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, E8M0, torch.uint8], ids=str)
def test_a_linear_layer_gives_the_same_in_fnuz(scale_dtype: torch.dtype) -> None:
    weight, scale = quantize(torch.randn(200, 300), "block", scale_dtype=scale_dtype)
    x = torch.randn(3, 300)

    fnuz, doubled = convert_to_fnuz(weight, scale)

    assert (fnuz.dtype, doubled.dtype) == (E4M3_FNUZ, scale_dtype)
    assert torch.equal(fp8dispatch.dequantize(fnuz, doubled), fp8dispatch.dequantize(weight, scale))
    assert fp8dispatch.fp8_linear(x, fnuz, doubled).isfinite().all()


@pytest.mark.parametrize(
    "scale",
    [
        torch.tensor([3e38]),
        torch.tensor([60000.0], dtype=torch.float16),
        torch.tensor([254], dtype=torch.uint8),
    ],
    ids=lambda scale: dtype_name(scale.dtype),
)
def test_a_scale_whose_double_does_not_fit_is_refused(scale: torch.Tensor) -> None:
    with pytest.raises(NumericalOverflowError, match="doubled scale must fit"):
        double_scale(scale)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=dtype_name)
def test_packed_groups_restore_their_values(group: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3, 5, 256, device=device).to(dtype)
    x[0, 0, :group] = 0

    payload, scale = pack_to_fp8_e4m3(x, group)

    assert (payload.shape, payload.dtype) == (x.shape, torch.uint8)
    assert (scale.shape, scale.dtype) == ((x.numel() // group,), torch.float32)
    groups = x.double().reshape(-1, group)
    exact = (groups.abs().amax(1) / 448).clamp(min=1e-8)
    assert torch.equal(scale, exact.float()), "it is the multiplier, not its inverse"
    quotient = (groups.float() / scale[:, None]).double().cpu()
    codes = nearest_even(quotient.flatten(), E4M3)
    assert torch.equal(payload.flatten().cpu().long(), codes)


def test_a_group_over_the_end_of_a_row_is_refused() -> None:
    with pytest.raises(ShapeError, match="takes ragged rows"):
        pack_to_fp8_e4m3(torch.zeros(2, 96), 64)  # 192 values divide into groups, rows do not
    with pytest.raises(NumericalOverflowError, match="finite"):
        pack_to_fp8_e4m3(torch.full((1, 64), NAN))


RAGGED = [(576, 576), (192, 576), (1536, 200), (1, 1), (100, 256)]


@pytest.mark.parametrize("scale_dtype", ["float32", "uint8", "bfloat16"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_scale_bytes_are_those_of_the_scale(recipe: Recipe, scale_dtype: str) -> None:
    for shape in RAGGED:
        _, scale = quantize(torch.ones(shape), recipe, scale_dtype=getattr(torch, scale_dtype))
        assert scale_bytes(shape, recipe, scale_dtype) == scale.nbytes
        assert scale_bytes((7, *shape), recipe, scale_dtype) == 7 * scale.nbytes


def test_the_estimate_is_what_conversion_gives() -> None:
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 200), torch.nn.Linear(200, 300), torch.nn.Linear(300, 70, bias=False)
    ).bfloat16()
    names = {"1.weight", "2.weight"}
    specs = {
        name: TensorSpec(tuple(tensor.shape), dtype_name(tensor.dtype))
        for name, tensor in model.state_dict().items()
    }
    estimate = estimate_memory(specs, "block", quantized=lambda name, spec: name in names)
    before = sum(tensor.nbytes for tensor in model.state_dict().values())

    fp8dispatch.convert_model(model, "block")

    after = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (estimate.before, estimate.after) == (before, after)
    assert estimate.quantized == ("1.weight", "2.weight")
    assert estimate.kept == 50 * 200 * 2 + 300 * 2


def test_recipes_are_compared_on_a_large_model() -> None:
    """The shapes of a Llama-3 70B, none of whose 141 GB are in memory."""
    hidden, inner, kv = 8192, 28672, 1024
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
    }
    specs = {
        f"model.layers.{index}.{name}": TensorSpec(shape, "bfloat16")
        for index in range(80)
        for name, shape in layer.items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        specs[name] = TensorSpec((128256, hidden), "bfloat16")
    group = Recipe(Granularity.BLOCK, (1, 64))

    block, row, grouped = compare_recipes(specs, ["block", "row", group])

    assert round(block.before / 1e9) == 141
    assert block.scales * 4096 == block.data, "4 bytes for each 128 x 128"
    assert grouped.scales * 16 == grouped.data
    assert block.saved == pytest.approx(0.485, abs=0.001)
    rows = 80 * (hidden * 3 + kv * 2 + inner * 2)
    assert row.scales == 4 * rows > block.scales, "a row of 8192 is less than 128 x 128"
    assert len(block.quantized) == 80 * 7


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "taken"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 4), "bfloat16", True),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 8, 4), "bfloat16", True),
        ("model.embed_tokens.weight", (8, 4), "bfloat16", False),
        ("lm_head.weight", (8, 4), "bfloat16", False),
        ("model.layers.0.mlp.gate.weight", (8, 4), "float32", False),
        ("model.layers.0.input_layernorm.weight", (8,), "bfloat16", False),
        ("model.layers.0.mlp.up_proj.weight", (8, 4), "float8_e4m3fn", False),
        ("model.layers.0.mlp.up_proj.bias", (8, 4), "bfloat16", False),
    ],
)
def test_which_tensors_an_estimate_counts(
    name: str, shape: tuple[int, ...], dtype: str, taken: bool
) -> None:
    assert is_linear_weight(name, TensorSpec(shape, dtype)) is taken


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: encode(torch.ones(1).double(), E4M3), DTypeError, "found float64"),
        (lambda: encode([1.0], E4M3), DTypeError, "found list"),
        (lambda: encode(torch.ones(1), torch.float16), DTypeError, "float8_e8m0fnu, found torch"),
        (lambda: encode(torch.ones(1), E4M3, nonfinite="zero"), InvalidInputError, "'saturate'"),
        (lambda: decode(torch.ones(1), E4M3), DTypeError, "uint8 bytes, found float32"),
        (lambda: quantize(torch.ones(1, 1), nonfinite=None), InvalidInputError, "found None"),
        (lambda: convert_to_fnuz(torch.ones(1), torch.ones(1)), DTypeError, "found float32"),
        (lambda: double_scale(torch.ones(1).double()), DTypeError, "convert it to float32"),
        (lambda: pack_to_fp8_e4m3(torch.ones(64), 0), ShapeError, "group"),
        (lambda: TensorSpec((1,), "float4").nbytes, DTypeError, "found 'float4'"),
        (lambda: TensorSpec((-1,), "uint8").nbytes, ShapeError, "not be negative"),
        (lambda: scale_bytes((3,), Recipe.parse("row")), ShapeError, r"\[N, K\]"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
