"""Fused RMSNorm and SiLU-gating: scales and restored values of the two steps taken in float64.

Codes are not compared: the fused kernels sum in an order of their own, so a value that lies between
two codes may take either. A restored value is held to half a step of FP8.
"""

from __future__ import annotations

import pytest
import torch

from fp8dispatch.formats import ACTIVATION_DTYPES, max_value
from fp8dispatch.kernels import fused_quantize as kernels
from fp8dispatch.quantization import fused
from tests.oracle import name_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets NaN and infinity

E4M3, E4M3_FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
EPS = 1e-5
inputs = pytest.mark.parametrize("x_dtype", ACTIVATION_DTYPES, ids=name_of)
formats = pytest.mark.parametrize("dtype", [E4M3, E4M3_FNUZ], ids=name_of)
# (K, group size): even, ragged, a group of odd size, a row in one group, one column a group.
groups = pytest.mark.parametrize(
    ("k", "group"), [(96, 32), (75, 32), (50, 24), (40, 40), (33, 64), (5, 1)], ids=str
)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.double() * gate.double().sigmoid() * up.double()


def assert_quantized(
    data: torch.Tensor, scale: torch.Tensor, wanted: torch.Tensor, group: int, *, single: bool
) -> None:
    """`data` and `scale` restore `wanted` [M, K] float64 as closely as FP8 can."""
    k = wanted.shape[1]
    limit = max_value(data.dtype)
    parts = torch.split(wanted, group, dim=1)
    amax = torch.stack([part.abs().amax(1) for part in parts], 1)
    expected = torch.where(amax == 0, torch.ones_like(amax), amax.clamp(min=1e-12) / limit)
    assert scale.shape == expected.shape
    torch.testing.assert_close(scale.double(), expected, rtol=2e-5, atol=0)
    spread = scale.double().repeat_interleave(group, 1)[:, :k]
    restored = data.float().double() * spread
    # Half a step: 2^-4 of a normal value, half the smallest code below; and what the sum moved.
    # The interpreter's cast may take the code below a power of two: one step there.
    smallest = 2.0**-9 if data.dtype == E4M3 else 2.0**-10
    bound = (2.0**-4 + 1e-4) * wanted.abs() + smallest * spread
    assert ((restored - wanted).abs() <= bound).all()
    assert single is (scale.shape[1] == 1)


def outputs(
    m: int, k: int, group: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    """Data, and scales along M with room behind them that must stay as it is."""
    data = torch.empty(m, k, dtype=dtype, device=device)
    return data, torch.full((-(-k // group), m + 3), -1.0, device=device).t()


def rows(m: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows of very different size; row 1 is zero."""
    x = torch.randn(m, k) * torch.exp(2 * torch.randn(m, 1))
    x[1] = 0
    return x.to(dtype).to(device)


@formats
@inputs
@groups
def test_rms_norm(
    k: int, group: int, x_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    x, weight = rows(4, k, x_dtype, device), torch.randn(k, device=device).to(x_dtype)
    data, scale = outputs(4, k, group, dtype, device)

    kernels.rms_norm_quantize(x, weight, EPS, data, scale[:4], group)

    assert_quantized(data, scale[:4], norm(x, weight), group, single=group >= k)
    assert (scale[4:] == -1).all()


@inputs
def test_rms_norm_adds_the_residual_as_the_model_keeps_it(
    x_dtype: torch.dtype, device: str
) -> None:
    x, residual = rows(5, 70, x_dtype, device), torch.randn(5, 70, device=device).to(x_dtype)
    weight = torch.randn(70, device=device)
    data, scale = outputs(5, 70, 32, E4M3, device)
    canvas = torch.full((5, 150), torch.nan, device=device, dtype=x_dtype)
    total = canvas[:, 3:143:2]

    kernels.rms_norm_quantize(x, weight, EPS, data, scale[:5], 32, residual, total)

    assert torch.equal(total, x + residual)
    assert canvas.isnan().sum().item() == 5 * 80
    assert_quantized(data, scale[:5], norm(x + residual, weight), 32, single=False)


@formats
@inputs
@groups
def test_silu_mul(
    k: int, group: int, x_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    gate, up = rows(4, k, x_dtype, device), torch.randn(4, k, device=device).to(x_dtype)
    data, scale = outputs(4, k, group, dtype, device)

    kernels.silu_mul_quantize(gate, up, data, scale[:4], group)

    assert_quantized(data, scale[:4], gated(gate, up), group, single=group >= k)
    assert (scale[4:] == -1).all()


@pytest.mark.parametrize("group", [32, 4096], ids=["groups", "row"])
@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "silu_mul"])
def test_rows_too_long_for_registers(
    operation: str, group: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are lowered instead of the rows lengthened, so that the interpreter keeps up."""
    monkeypatch.setattr(kernels, "_LONGEST_SINGLE_PASS", 64)
    monkeypatch.setattr(kernels, "_CHUNK", 64)
    x, other = rows(3, 150, torch.bfloat16, device), torch.randn(3, 150, device=device).bfloat16()
    weight = torch.randn(150, device=device)
    data, scale = outputs(3, 150, group, E4M3, device)
    scale = scale[:3]

    if operation == "rms_norm":
        kernels.rms_norm_quantize(x, weight, EPS, data, scale, group)
        wanted = norm(x, weight)
    elif operation == "add_rms_norm":
        total = torch.empty_like(x)
        kernels.rms_norm_quantize(x, weight, EPS, data, scale, group, other, total)
        wanted = norm(x + other, weight)
        assert torch.equal(total, x + other)
    else:
        kernels.silu_mul_quantize(x, other, data, scale, group)
        wanted = gated(x, other)

    assert_quantized(data, scale, wanted, group, single=group > 150)


@pytest.mark.parametrize("layout", ["halves", "transposed", "every second row", "expanded"])
def test_strided_rows(layout: str, device: str) -> None:
    whole = torch.randn(80, 80, device=device).bfloat16()
    first, second = {
        "halves": whole[:5].chunk(2, 1),
        "transposed": (whole[:40, :5].t(), whole[40:, :5].t()),
        "every second row": (whole[:10:2, :40], whole[1:11:2, :40]),
        "expanded": (whole[:1, :40].expand(5, 40), whole[:5, 40:]),
    }[layout]
    weight = torch.randn(80, device=device)[::2]
    data, scale = outputs(5, 40, 16, E4M3, device)
    gated_data, gated_scale = outputs(5, 40, 16, E4M3, device)
    total = torch.empty(5, 40, device=device, dtype=torch.bfloat16)

    kernels.rms_norm_quantize(first, weight, EPS, data, scale[:5], 16, second, total)
    kernels.silu_mul_quantize(first, second, gated_data, gated_scale[:5], 16)

    assert_quantized(data, scale[:5], norm(first + second, weight), 16, single=False)
    assert_quantized(gated_data, gated_scale[:5], gated(first, second), 16, single=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_non_finite_element_spoils_its_own_row_only(value: float, device: str) -> None:
    x, up = torch.randn(3, 64, device=device), torch.randn(3, 64, device=device)
    weight = torch.randn(64, device=device)
    x[1, 40] = value
    data, scale = outputs(3, 64, 32, E4M3, device)
    gated_data, gated_scale = outputs(3, 64, 32, E4M3, device)

    kernels.rms_norm_quantize(x, weight, EPS, data, scale[:3], 32)
    kernels.silu_mul_quantize(x, up, gated_data, gated_scale[:3], 32)

    assert not scale[1, 1].isfinite()
    assert not gated_scale[1, 1].isfinite()
    assert gated_scale[1, 0].isfinite(), "groups of a product are independent"
    others = [0, 2]
    assert_quantized(data[others], scale[others], norm(x, weight)[others], 32, single=False)
    assert_quantized(
        gated_data[others], gated_scale[others], gated(x, up)[others], 32, single=False
    )


def test_groups_that_no_kernel_takes_go_the_two_steps(device: str) -> None:
    assert kernels.takes(7168, 128)
    assert kernels.takes(7168, 1)
    assert kernels.takes(53_248, 53_248)
    assert kernels.takes(100, 20_000)
    assert not kernels.takes(20_000, 10_000)
    x, weight = rows(2, 20_000, torch.bfloat16, device), torch.ones(20_000, device=device)

    data, scale, _ = fused.rms_norm_quantize(x, None, weight, EPS, 10_000, E4M3, use_kernels=True)

    assert_quantized(data, scale, norm(x, weight), 10_000, single=False)


@pytest.mark.parametrize("group", [32, 4096], ids=["groups", "row"])
def test_kernels_and_plain_torch_agree(group: int, device: str) -> None:
    x, other = rows(6, 100, torch.bfloat16, device), torch.randn(6, 100, device=device).bfloat16()
    weight = torch.randn(100, device=device).bfloat16()
    for kernel in (True, False):
        data, scale, total = fused.rms_norm_quantize(
            x, other, weight, EPS, group, E4M3, use_kernels=kernel
        )
        assert total is not None and torch.equal(total, x + other)
        assert scale.stride(0) == 1, "M-major"
        assert_quantized(data, scale, norm(x + other, weight), group, single=group > 100)
        data, scale = fused.silu_mul_quantize(x, other, group, E4M3, use_kernels=kernel)
        assert scale.stride(0) == 1
        assert_quantized(data, scale, gated(x, other), group, single=group > 100)


def test_no_rows_launch_nothing(device: str) -> None:
    x, weight = torch.empty(0, 40, device=device), torch.ones(40, device=device)

    for kernel in (True, False):
        data, scale, total = fused.rms_norm_quantize(
            x, x, weight, EPS, 16, E4M3, use_kernels=kernel
        )
        assert (data.shape, scale.shape) == ((0, 40), (0, 3))
        assert total is not None and total.shape == (0, 40)
        data, scale = fused.silu_mul_quantize(x, x, 16, E4M3, use_kernels=kernel)
        assert (data.shape, scale.shape) == ((0, 40), (0, 3))
