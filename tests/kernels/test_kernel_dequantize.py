"""The weight dequantiser equals ``float32(data) * scale`` rounded once."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch.formats import FLOAT8_DTYPES
from fp8dispatch.kernels.dequantize import dequantize_weight

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets the NaN codes

OUTPUTS = [torch.bfloat16, torch.float16, torch.float32]


def random_codes(n: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Every code occurs, NaN and infinities too."""
    return torch.randint(0, 256, (n, k), dtype=torch.uint8).view(dtype).to(device)


def reference(
    data: torch.Tensor,
    scale: torch.Tensor,
    block_size: tuple[int, int] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    n, k = data.shape
    block_n, block_k = (1, k) if block_size is None else block_size
    wide = scale.cpu().repeat_interleave(block_n, 0)[:n].repeat_interleave(block_k, 1)[:, :k]
    return (data.cpu().float() * wide).to(dtype)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", OUTPUTS, ids=str)
@pytest.mark.parametrize("block_size", [(128, 128), None], ids=str)
def test_formats_and_outputs(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    block_size: tuple[int, int] | None,
    device: str,
) -> None:
    data = random_codes(140, 270, dtype, device)
    scale = torch.rand((140, 1) if block_size is None else (2, 3), device=device) + 0.01
    out = torch.empty(140, 270, dtype=out_dtype, device=device)

    dequantize_weight(data, scale, out, block_size)

    assert_same(out, reference(data, scale, block_size, out_dtype))


@pytest.mark.parametrize(
    "block_size", [(64, 128), (1, 32), (1, 64), (48, 80), (256, 512), (3, 1)], ids=str
)
def test_block_sizes(block_size: tuple[int, int], device: str) -> None:
    n, k = 70, 190
    data = random_codes(n, k, torch.float8_e4m3fn, device)
    blocks = (-(-n // block_size[0]), -(-k // block_size[1]))
    scale = torch.rand(blocks[1], blocks[0], device=device).t()
    out = torch.empty(n, k, dtype=torch.bfloat16, device=device)

    dequantize_weight(data, scale, out, block_size)

    assert_same(out, reference(data, scale, block_size, torch.bfloat16))


def test_a_tensor_scale_is_an_expanded_row_scale(device: str) -> None:
    data = random_codes(9, 40, torch.float8_e4m3fn, device)
    scale = torch.tensor([[0.37]], device=device).expand(9, 1)
    out = torch.empty(9, 40, dtype=torch.float16, device=device)

    dequantize_weight(data, scale, out, None)

    assert_same(out, reference(data, scale, None, torch.float16))


def test_a_column_strip_fills_only_its_own_place(device: str) -> None:
    data = random_codes(70, 300, torch.float8_e4m3fn, device)
    data.view(torch.uint8).bitwise_and_(0x3F)  # finite, so that the poison shows
    scale = torch.rand(2, 5, device=device)
    canvas = torch.full((72, 220), torch.nan, device=device)

    dequantize_weight(data[:, 128:292], scale[:, 2:], canvas[1:71, 5:169], (64, 64))

    expected = reference(data[:, 128:292], scale[:, 2:], (64, 64), torch.float32)
    assert_same(canvas[1:71, 5:169], expected)
    assert canvas.isnan().sum().item() == 72 * 220 - 70 * 164


def test_transposed_data_and_output(device: str) -> None:
    data = random_codes(90, 60, torch.float8_e5m2, device).t()
    scale = torch.rand(4, 3, device=device)
    out = torch.empty(90, 60, dtype=torch.bfloat16, device=device).t()

    dequantize_weight(data, scale, out, (16, 32))

    assert_same(out, reference(data, scale, (16, 32), torch.bfloat16))
