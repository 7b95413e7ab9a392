"""Activation quantisers equal plain torch in float32: scales and codes, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch.formats import AMAX_FLOOR, max_value
from fp8dispatch.kernels.quantize_activation import (
    quantize_groups,
    quantize_rows,
    quantize_static,
)

# NumPy, behind Triton's interpreter, warns about the NaN and infinities that tests plant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

E4M3, E4M3_FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
formats = pytest.mark.parametrize("dtype", [E4M3, E4M3_FNUZ], ids=str)
inputs = pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def reference(
    x: torch.Tensor, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[M, K]`` and scales ``[M, ceil(K / group_size)]`` in float32 on the CPU."""
    largest = max_value(dtype)
    values = x.cpu().float()
    groups = torch.split(values, group_size, dim=1)
    amax = torch.stack([group.abs().amax(dim=1) for group in groups], dim=1)
    floored = amax.clamp(min=AMAX_FLOOR)
    scale = torch.where(amax == 0, torch.ones_like(amax), floored / largest)
    wide = scale.repeat_interleave(group_size, dim=1)[:, : x.shape[1]]
    return (values / wide).clamp(-largest, largest).to(dtype), scale


def assert_codes_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Byte for byte, except that any NaN code stands for any other."""
    found = found.cpu()
    nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), nan)
    assert torch.equal(found.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])


def m_major(m: int, groups: int, device: str) -> torch.Tensor:
    """Scales as the GEMMs like them: consecutive along M, M padded; filled with a marker."""
    return torch.full((groups, m + 3), -1.0, device=device).t()


def wild(m: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows of very different size, an all-zero row, and one below the floor of the amax."""
    x = torch.randn(m, k) * torch.exp(3 * torch.randn(m, 1))
    x[0] = 0
    if m > 2:
        x[2] = torch.randn(k) * 1e-20
    return x.to(dtype).to(device)


@formats
@inputs
@pytest.mark.parametrize(
    ("m", "k", "group_size"),
    [
        pytest.param(5, 384, 128, id="even"),
        pytest.param(70, 300, 128, id="ragged-k"),
        pytest.param(3, 100, 48, id="odd-group"),
        pytest.param(4, 33, 1, id="one-element-groups"),
        pytest.param(3, 90, 256, id="group-longer-than-k"),
        pytest.param(2, 640, 320, id="odd-large-group"),
    ],
)
def test_groups(
    m: int, k: int, group_size: int, x_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    x = wild(m, k, x_dtype, device)
    groups = -(-k // group_size)
    data = torch.empty(m, k, dtype=dtype, device=device)
    scale = m_major(m, groups, device)

    quantize_groups(x, data, scale[:m], group_size)

    expected_data, expected_scale = reference(x, group_size, dtype)
    assert torch.equal(scale[:m].cpu(), expected_scale)
    assert_codes_equal(data, expected_data)
    assert (scale[m:] == -1).all()


@pytest.mark.parametrize("m", [1100, 64, 65], ids=str)
def test_every_tile_class(m: int, device: str) -> None:
    x = wild(m, 200, torch.bfloat16, device)
    data = torch.empty(m, 200, dtype=E4M3, device=device)
    scale = torch.empty(m, 2, device=device)

    quantize_groups(x, data, scale, 128)

    expected_data, expected_scale = reference(x, 128, E4M3)
    assert torch.equal(scale.cpu(), expected_scale)
    assert_codes_equal(data, expected_data)


def test_groups_too_long_for_a_tile(device: str) -> None:
    x = wild(3, 20_100, torch.bfloat16, device)
    data = torch.empty(3, 20_100, dtype=E4M3, device=device)
    scale = m_major(3, 2, device)

    quantize_groups(x, data, scale[:3], 20_000)

    expected_data, expected_scale = reference(x, 20_000, E4M3)
    assert torch.equal(scale[:3].cpu(), expected_scale)
    assert_codes_equal(data, expected_data)


@formats
@pytest.mark.parametrize("k", [1, 257, 16_384, 20_000], ids=str)
def test_rows(k: int, dtype: torch.dtype, device: str) -> None:
    x = wild(4, k, torch.bfloat16, device)
    data = torch.empty(4, k, dtype=dtype, device=device)
    scale = torch.empty(4, 3, device=device)[:, 1:2]

    quantize_rows(x, data, scale)

    expected_data, expected_scale = reference(x, k, dtype)
    assert torch.equal(scale.cpu(), expected_scale)
    assert_codes_equal(data, expected_data)


def test_rows_takes_a_one_dimensional_scale(device: str) -> None:
    x = wild(5, 40, torch.float32, device)
    data = torch.empty(5, 40, dtype=E4M3, device=device)
    scale = torch.empty(5, device=device)

    quantize_rows(x, data, scale)

    assert torch.equal(scale.cpu(), reference(x, 40, E4M3)[1][:, 0])


@pytest.mark.parametrize("layout", ["transposed", "column-slice", "every-second-row", "expanded"])
def test_strided_input(layout: str, device: str) -> None:
    whole = wild(160, 140, torch.bfloat16, device)
    x = {
        "transposed": whole.t(),
        "column-slice": whole[:, 3:137],
        "every-second-row": whole[::2],
        "expanded": whole[3:4].expand(7, 140),
    }[layout]
    m, k = x.shape
    data = torch.empty(m, k, dtype=E4M3, device=device)
    scale = torch.empty(m, -(-k // 128), device=device)
    row_data, row_scale = torch.empty_like(data), torch.empty(m, 1, device=device)
    static_data = torch.empty_like(data)

    quantize_groups(x, data, scale, 128)
    quantize_rows(x, row_data, row_scale)
    quantize_static(x, static_data, torch.tensor([0.5], device=device))

    expected_data, expected_scale = reference(x, 128, E4M3)
    assert torch.equal(scale.cpu(), expected_scale)
    assert_codes_equal(data, expected_data)
    assert_codes_equal(row_data, reference(x, k, E4M3)[0])
    assert_codes_equal(static_data, (x.cpu().float() / 0.5).clamp(-448, 448).to(E4M3))


@formats
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_non_finite_element_spoils_its_own_group_only(
    value: float, dtype: torch.dtype, device: str
) -> None:
    x = torch.randn(6, 300, device=device).to(torch.bfloat16)
    clean = x.clone()
    x[3, 140] = value
    data = torch.empty(6, 300, dtype=dtype, device=device)
    scale = torch.empty(6, 3, device=device)

    quantize_groups(x, data, scale, 128)

    expected_data, expected_scale = reference(x, 128, dtype)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=0, atol=0, equal_nan=True)
    assert_codes_equal(data, expected_data)
    assert not scale[3, 1].isfinite()
    restored = data[3, 128:256].float() * scale[3, 1]
    assert not restored.isfinite().any()
    clean_data, clean_scale = reference(clean, 128, dtype)
    others = torch.ones(6, 300, dtype=torch.bool)
    others[3, 128:256] = False
    assert torch.equal(data.cpu().view(torch.uint8)[others], clean_data.view(torch.uint8)[others])
    assert torch.equal(scale.cpu().isfinite(), torch.isfinite(expected_scale))
    assert torch.equal(scale.cpu()[:, [0, 2]], clean_scale[:, [0, 2]])


@pytest.mark.parametrize("k", [100, 20_000], ids=["one-pass", "two-pass"])
def test_a_non_finite_element_spoils_its_own_row_only(k: int, device: str) -> None:
    x = torch.randn(3, k, device=device)
    x[0, 7] = torch.nan
    x[2, k - 1] = torch.inf
    data = torch.empty(3, k, dtype=E4M3, device=device)
    scale = torch.empty(3, 1, device=device)

    quantize_rows(x, data, scale)

    expected_data, expected_scale = reference(x, k, E4M3)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=0, atol=0, equal_nan=True)
    assert_codes_equal(data, expected_data)


@formats
@inputs
@pytest.mark.parametrize(("m", "k"), [(3, 70), (130, 1100)], ids=str)
def test_static_clamps_finite_values_and_marks_the_others(
    m: int, k: int, x_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    x = (torch.randn(m, k) * 30).to(x_dtype)
    x[0, 1], x[1, 2], x[1, 3] = torch.inf, -torch.inf, torch.nan
    x[2, 0] = 6e4
    scale = torch.tensor([0.037])
    data = torch.empty(m, k, dtype=dtype, device=device)

    quantize_static(x.to(device), data, scale.to(device))

    largest = max_value(dtype)
    expected = (x.float() / scale).clamp(-largest, largest)
    expected[~x.isfinite()] = torch.nan
    assert_codes_equal(data, expected.to(dtype))
    assert data[2, 0].float().item() == largest


@pytest.mark.parametrize("shape", [(0, 128), (4, 0)], ids=str)
def test_empty_input_launches_nothing(shape: tuple[int, int], device: str) -> None:
    x = torch.empty(shape, device=device)
    data = torch.empty(shape, dtype=E4M3, device=device)
    scale = torch.full((4, 1), 5.0, device=device)

    quantize_groups(x, data, scale, 128)
    quantize_rows(x, data, scale)
    quantize_static(x, data, scale[0])

    assert (scale == 5).all()
