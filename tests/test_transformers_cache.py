"""The FP8 cache inside Transformers: what attention sees, and generation over it."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch import Calibrator, DTypeError, InvalidInputError, KVScales, kv_cache_scales
from fp8dispatch.formats import dtype_name
from fp8dispatch.integrations.transformers_cache import fp8_cache
from fp8dispatch.quantization.kv_cache import dequantize_kv, quantize_kv
from tests.calibrate.models import VOCABULARY, llama

pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=dtype_name)
@pytest.mark.parametrize("per_head", [False, True], ids=["layer", "head"])
def test_logits_over_the_cache_stay_close(per_head: bool, dtype: torch.dtype) -> None:
    model = llama()
    ids = torch.randint(0, VOCABULARY, (2, 24))
    with torch.no_grad(), Calibrator(model) as calibrator:
        expected = model(ids).logits
    scales = kv_cache_scales(calibrator.stats(), per_head=per_head, dtype=dtype)
    cache = fp8_cache(scales, dtype)

    with torch.no_grad():
        whole = model(ids, past_key_values=cache).logits
        steps = fp8_cache(scales, dtype)
        parts = [model(ids[:, :9], past_key_values=steps).logits]
        parts += [model(ids[:, at : at + 1], past_key_values=steps).logits for at in range(9, 24)]

    error = (whole - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05
    assert (torch.cat(parts, 1) - whole).norm() < 0.1 * (whole - expected).norm()
    assert cache.get_seq_length() == steps.get_seq_length() == 24
    for layer, other in zip(cache.layers, steps.layers, strict=True):
        assert layer.keys.dtype == torch.uint8, "one byte for each number"
        differ = (layer.keys != other.keys).float().mean()
        assert differ < 0.01, "but for roundings at a tie"


def test_what_is_kept_is_what_the_quantiser_makes() -> None:
    scales = KVScales(torch.tensor([0.1, 2.0]), torch.tensor([0.3]))
    cache = fp8_cache([scales])
    key, value = torch.randn(1, 2, 3, 4).bfloat16(), torch.randn(1, 2, 3, 4).bfloat16()

    got = cache.update(key, value, 0)
    again = cache.update(key[:, :, :1], value[:, :, :1], 0)

    assert torch.equal(got[0], dequantize_kv(quantize_kv(key, scales.key), scales.key))
    assert torch.equal(again[1][:, :, 3:], got[1][:, :, :1])
    assert got[0].dtype == torch.bfloat16
    assert again[0].shape == (1, 2, 4, 4)
    cache.reorder_cache(torch.tensor([0]))
    cache.crop(-1)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("beams", [1, 2])
def test_a_model_generates_over_it(beams: int) -> None:
    model = llama()
    ids = torch.randint(1, VOCABULARY, (1, 8))
    with torch.no_grad(), Calibrator(model) as calibrator:
        model(ids)
    cache = fp8_cache(kv_cache_scales(calibrator.stats()))
    tokens = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=5,
        num_beams=beams,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert tokens.shape == (1, 13)
    assert cache.get_seq_length() == 12


def test_a_cache_without_scales_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="kv_cache_scales"):
        fp8_cache({})
    with pytest.raises(DTypeError, match="dtype"):
        fp8_cache([KVScales(torch.ones(1), torch.ones(1))], torch.uint8)
