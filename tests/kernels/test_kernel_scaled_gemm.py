"""The scaled GEMM against the float64 product of the same dequantised operands.

The operands are exact, so two errors remain: accumulation, bounded per element by the sum of
absolute products, and one rounding of the result. Outputs lie inside a larger canvas of NaN, so a
write outside and an element never written both show.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from fp8dispatch.formats import FLOAT8_DTYPES
from fp8dispatch.kernels.gemm_config import GemmConfig
from fp8dispatch.kernels.scaled_gemm import scaled_gemm

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets planted NaNs

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# A tensor core adds FP8 products with about 14 bits inside one partial sum; float32 does not.
ACCUMULATION = {"cuda": 2.0**-12, "cpu": 2.0**-18}

SMALL_TILE = GemmConfig(
    block_m=16,
    block_n=32,
    block_k=32,
    group_m=2,
    num_warps=4,
    num_stages=2,
    programs_per_sm=1,
    descriptors=False,
)


@dataclass
class Case:
    """Operands of one call; scales differ in every block and are no powers of two."""

    a: torch.Tensor
    a_scale: torch.Tensor
    b: torch.Tensor
    b_scale: torch.Tensor
    bias: torch.Tensor | None
    block_size: tuple[int, int] | None

    def dequantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.a.shape[1]
        block_n, block_k = (1, max(k, 1)) if self.block_size is None else self.block_size
        a_scale = self.a_scale.cpu().double().repeat_interleave(block_k, 1)[:, :k]
        b_scale = self.b_scale.cpu().double().repeat_interleave(block_k, 1)[:, :k]
        b_scale = b_scale.repeat_interleave(block_n, 0)[: self.b.shape[0]]
        return self.a.cpu().double() * a_scale, self.b.cpu().double() * b_scale


def make_case(
    m: int,
    n: int,
    k: int,
    block_size: tuple[int, int] | None,
    device: str,
    *,
    formats: tuple[torch.dtype, torch.dtype] = (E4M3, E4M3),
    bias: torch.dtype | None = torch.bfloat16,
) -> Case:
    a = (torch.randn(m, k) * 3).to(formats[0])
    b = (torch.randn(n, k) * 3).to(formats[1])
    if block_size is None:
        a_scale, b_scale = torch.rand(m, 1) + 0.1, torch.rand(n, 1) + 0.1
    else:
        blocks_n, blocks_k = -(-n // block_size[0]), -(-k // block_size[1])
        a_scale = (torch.rand(blocks_k, m + 3) + 0.1).t()[:m]  # consecutive along M, padded
        b_scale = torch.rand(blocks_n, blocks_k) + 0.1
    bias_tensor = None if bias is None else torch.randn(n).to(bias).to(device)
    return Case(
        a.to(device), a_scale.to(device), b.to(device), b_scale.to(device), bias_tensor, block_size
    )


def run(
    case: Case, out_dtype: torch.dtype = torch.bfloat16, config: GemmConfig | None = None
) -> torch.Tensor:
    """Run into the middle of a canvas of NaN; return the output on the CPU."""
    m, n = case.a.shape[0], case.b.shape[0]
    canvas = torch.full((m + 3, n + 24), torch.nan, dtype=out_dtype, device=case.a.device)
    out = canvas[1 : m + 1, 8 : n + 8]
    scaled_gemm(case.a, case.a_scale, case.b, case.b_scale, case.bias, out, case.block_size, config)
    outside = canvas.isnan()
    outside[1 : m + 1, 8 : n + 8] = True
    assert outside.all(), "wrote outside the output"
    return out.cpu()


def assert_right(case: Case, out: torch.Tensor) -> None:
    a, b = case.dequantized()
    bias = torch.zeros(b.shape[0]) if case.bias is None else case.bias.cpu()
    expected = a @ b.T + bias.double()
    mass = a.abs() @ b.abs().T + bias.double().abs()
    bound = ROUNDING[out.dtype] * expected.abs() + ACCUMULATION[case.a.device.type] * mass
    worst = ((out.double() - expected).abs() / bound.clamp(min=1e-30)).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"


@pytest.mark.parametrize(
    ("m", "n", "k", "block_size"),
    [
        pytest.param(1, 40, 128, (128, 128), id="one-row"),
        pytest.param(17, 130, 300, (128, 128), id="ragged-everything"),
        pytest.param(33, 200, 256, (64, 128), id="weight-blocks-of-64"),
        pytest.param(130, 200, 384, (128, 128), id="many-tiles"),
        pytest.param(20, 100, 200, (1, 32), id="scale-per-row-and-32"),
        pytest.param(5, 70, 130, (1, 64), id="scale-per-row-and-64"),
        pytest.param(19, 150, 250, (48, 80), id="no-powers-of-two"),
        pytest.param(70, 260, 400, (256, 128), id="tall-weight-blocks"),
        pytest.param(9, 300, 520, (256, 256), id="blocks-of-several-chunks"),
        pytest.param(6, 33, 50, (7, 16), id="tiny-blocks"),
        pytest.param(12, 40, 70, (128, 128), id="k-below-one-block"),
        pytest.param(12, 40, 384, (128, 256), id="last-block-of-fewer-chunks"),
        pytest.param(17, 130, 300, None, id="row-scales"),
        pytest.param(66, 140, 256, None, id="row-scales-even"),
        pytest.param(3, 20, 7, None, id="row-scales-tiny"),
    ],
)
@pytest.mark.parametrize("bias", [None, torch.float16], ids=["no-bias", "bias"])
def test_shapes_and_recipes(
    m: int,
    n: int,
    k: int,
    block_size: tuple[int, int] | None,
    bias: torch.dtype | None,
    device: str,
) -> None:
    case = make_case(m, n, k, block_size, device, bias=bias)

    assert_right(case, run(case))


@pytest.mark.parametrize("a_format", FLOAT8_DTYPES, ids=str)
@pytest.mark.parametrize("b_format", FLOAT8_DTYPES, ids=str)
def test_every_pair_of_formats(a_format: torch.dtype, b_format: torch.dtype, device: str) -> None:
    m = 4 if device == "cpu" else 70  # a full tile where that is not slow
    case = make_case(m, 40, 160, (128, 128), device, formats=(a_format, b_format))

    assert_right(case, run(case, torch.float32))


@pytest.mark.parametrize("out_dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("block_size", [(128, 128), None], ids=str)
def test_output_dtypes(
    out_dtype: torch.dtype, block_size: tuple[int, int] | None, device: str
) -> None:
    case = make_case(20, 72, 256, block_size, device, bias=torch.float32)

    assert_right(case, run(case, out_dtype))


@pytest.mark.parametrize("m", [5, 80], ids=str)
@pytest.mark.parametrize("layout", ["b-transposed", "b-column-slice", "a-row-stride", "unaligned"])
def test_strided_operands(layout: str, m: int, device: str) -> None:
    case = make_case(m, 96, 256, (128, 128), device)
    if layout == "b-transposed":
        case.b = case.b.view(torch.uint8).t().contiguous().view(E4M3).t()
    elif layout == "b-column-slice":
        case.b = torch.cat([case.b, case.b], dim=1).repeat_interleave(2, 0)[::2, 64:320]
    elif layout == "a-row-stride":
        case.a = torch.cat([case.a, case.a], dim=1)[:, 16:272]
    else:
        case.a = torch.cat([case.a, case.a], dim=1)[:, 3:259]
        case.b = torch.cat([case.b, case.b], dim=1)[:, 5:261]

    assert_right(case, run(case))


def test_strided_scales_and_bias(device: str) -> None:
    case = make_case(18, 150, 384, (64, 128), device)
    assert case.bias is not None
    case.a_scale = case.a_scale.contiguous()
    case.b_scale = case.b_scale.t().contiguous().t()
    case.bias = case.bias.repeat_interleave(3)[::3]

    assert_right(case, run(case))


def test_expanded_scales_are_static_and_tensor_recipes(device: str) -> None:
    block = make_case(18, 70, 300, (64, 128), device)
    block.a_scale = torch.tensor([[0.3]], device=device).expand(18, 3)
    tensor = make_case(18, 70, 300, None, device)
    tensor.a_scale = torch.tensor([[0.3]], device=device).expand(18, 1)
    tensor.b_scale = torch.tensor([[0.7]], device=device).expand(70, 1)

    assert_right(block, run(block))
    assert_right(tensor, run(tensor))


@pytest.mark.parametrize("block_size", [(128, 128), None], ids=str)
@pytest.mark.parametrize("m", [7, 67], ids=str)
def test_a_nan_row_stays_in_its_row(
    m: int, block_size: tuple[int, int] | None, device: str
) -> None:
    case = make_case(m, 70, 300, block_size, device)
    clean = run(case)
    spoiled = replace(case, a=case.a.clone(), a_scale=case.a_scale.clone())
    spoiled.a.view(torch.uint8)[2, 17] = 0x7F
    spoiled.a_scale[4, 0] = torch.inf

    out = run(spoiled)

    assert out[2].isnan().all()
    assert not out[4].isfinite().any()
    others = torch.ones(m, dtype=torch.bool)
    others[[2, 4]] = False
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("block_size", [(128, 128), None], ids=str)
def test_without_k_the_output_is_the_bias(block_size: tuple[int, int] | None, device: str) -> None:
    case = make_case(70, 20, 0, block_size, device)
    assert case.bias is not None

    out = run(case)

    assert torch.equal(out, case.bias.cpu().expand(70, 20))


@pytest.mark.parametrize(("m", "n"), [(0, 16), (16, 0)], ids=str)
def test_empty_output(m: int, n: int, device: str) -> None:
    case = make_case(m, n, 128, None, device)

    assert run(case).shape == (m, n)


@pytest.mark.parametrize("block_size", [(32, 64), (128, 128), None], ids=str)
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_persistent_programs_take_several_tiles(
    block_size: tuple[int, int] | None, flatten: bool, device: str
) -> None:
    case = make_case(70, 150, 160, block_size, device)

    assert_right(case, run(case, config=replace(SMALL_TILE, flatten=flatten)))


@pytest.mark.parametrize("block_size", [(32, 64), None], ids=str)
def test_descriptors_give_the_same_bits_as_pointers(
    block_size: tuple[int, int] | None, device: str
) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"needs TMA (capability 9.0), got {torch.cuda.get_device_capability()}")
    case = make_case(70, 150, 208, block_size, device)
    config = replace(SMALL_TILE, block_m=64, programs_per_sm=2)

    pointers = run(case, config=config)
    descriptors = run(case, config=replace(config, descriptors=True))

    assert_right(case, pointers)
    assert torch.equal(descriptors, pointers)


def test_rows_do_not_depend_on_how_many_there_are(device: str) -> None:
    case = make_case(80, 64, 256, (128, 128), device)
    half = replace(case, a=case.a[:70], a_scale=case.a_scale[:70])

    assert torch.equal(run(half), run(case)[:70])
