"""`fp8_experts_batched` and `fp8_experts_grouped`: every row by its expert, or zeros."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import fp8_experts_batched, fp8_experts_grouped
from fp8dispatch.recipe import BLOCK_128, ROW, Recipe
from tests import oracle
from tests.moe.cases import RECIPES, WAYS, make_call

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets planted NaNs

EXPERTS = (1, 3, 8, 60, 128, 256)
BACKENDS = ("eager", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_recipe_and_way_matches_the_oracle(backend: str, recipe: Recipe, way: str) -> None:
    call = make_call(way, recipe, 5, 40, 70, 11, bias=torch.float32)

    out = call.run(backend=backend)

    assert out.dtype == torch.bfloat16
    oracle.assert_matches(out, call.truth(), min_sqnr=40)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("sentinels", [0.0, 0.9])
def test_any_number_of_experts(backend: str, experts: int, sentinels: float) -> None:
    for way in ("batched", "grouped"):
        call = make_call(way, ROW, experts, 20, 24, 18, sentinels=sentinels)
        oracle.assert_matches(call.run(backend=backend), call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_all_rows_on_one_expert(backend: str, way: str) -> None:
    call = make_call(way, RECIPES["16x32"], 8, 24, 40, 40, sentinels=0.0, concentrated=True)

    oracle.assert_matches(call.run(backend=backend), call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["batched-gather", "grouped-index"])
@pytest.mark.parametrize("static", ["one", "each"])
def test_static_activation_scales(backend: str, way: str, static: str) -> None:
    call = make_call(way, RECIPES["16x32"], 4, 24, 40, 12, static=static, bias=torch.bfloat16)

    oracle.assert_matches(call.run(backend=backend), call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "scale_dtype", [torch.float8_e8m0fnu, torch.uint8, torch.bfloat16], ids=str
)
def test_scales_of_other_dtypes_are_decoded(backend: str, scale_dtype: torch.dtype) -> None:
    call = make_call("batched", RECIPES["16x32"], 3, 20, 40, 6, scale_dtype=scale_dtype)

    oracle.assert_matches(call.run(backend=backend), call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str
)
def test_other_weight_formats(backend: str, dtype: torch.dtype) -> None:
    call = make_call("grouped", RECIPES["16x32"], 3, 20, 40, 6, weight_dtype=dtype)

    oracle.assert_matches(call.run(backend=backend), call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_output_dtypes(backend: str, out_dtype: torch.dtype) -> None:
    call = make_call("batched", BLOCK_128, 3, 36, 130, 7, x_dtype=torch.float16)

    assert call.run(backend=backend).dtype == torch.float16
    out = call.run(backend=backend, out_dtype=out_dtype)

    assert out.dtype == out_dtype
    oracle.assert_matches(out, call.truth(), min_sqnr=40)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "index_dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_ids_of_every_integer_dtype_and_a_stride(backend: str, index_dtype: torch.dtype) -> None:
    call = make_call("batched", ROW, 9, 8, 16, 13, index_dtype=index_dtype, sentinels=0.4)
    assert call.arguments["expert_ids"].stride() == (2,)

    oracle.assert_matches(call.run(backend=backend), call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands(backend: str) -> None:
    """Half of a fused weight, experts stored as [K, N], activations stored by columns."""
    call = make_call("batched", BLOCK_128, 4, 256, 64, 6, bias=torch.float32)
    weight, scale = call.arguments["weight"], call.arguments["weight_scale"]
    expected = call.run(backend=backend)
    call.arguments["x"] = call.arguments["x"].t().contiguous().t()

    half = call.run(
        backend=backend,
        weight=weight[:, 128:],
        weight_scale=scale[:, 1:],
        bias=call.arguments["bias"][:, 128:],
        block_size=None,
    )
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)

    torch.testing.assert_close(half, expected[:, 128:], rtol=0, atol=0)
    torch.testing.assert_close(call.run(backend=backend, weight=turned), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "offsets", [[-5, 3, 2, 100], [7, 7, 7, 7], [0, 0, 0, 0], [9, 1, 4, 2**31 - 1], [2, 2, 6, 6]]
)
def test_offsets_are_clamped_and_uncovered_rows_are_zero(backend: str, offsets: list[int]) -> None:
    call = make_call("grouped", ROW, 4, 8, 16, 7)
    call.arguments["offsets"] = torch.tensor(offsets, dtype=torch.int64)
    owners: list[int | None] = []
    for expert, end in enumerate(offsets):
        owners += [expert] * (min(max(end, 0), 7) - len(owners))
    call.owners = owners + [None] * (7 - len(owners))

    oracle.assert_matches(call.run(backend=backend), call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row(backend: str) -> None:
    call = make_call("grouped", BLOCK_128, 3, 24, 40, 9, sentinels=0.3)
    clean = call.run(backend=backend)
    spoiled = call.arguments["x"].clone()
    spoiled[1, 5] = torch.nan
    spoiled[2, 5] = torch.inf

    out = call.run(backend=backend, x=spoiled)

    assert not out[1:3].isfinite().any()
    torch.testing.assert_close(out[3:], clean[3:], rtol=0, atol=0)
    assert torch.equal(out[0], clean[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_a_weight_does_not_reach_rows_without_an_expert(backend: str) -> None:
    call = make_call("batched-gather", BLOCK_128, 2, 24, 40, 10, sentinels=0.5)
    call.arguments["weight"].view(torch.uint8)[:, 3, 7] = 0x7F

    out = call.run(backend=backend)

    reached = {target for _, _, target in call.reached()}
    others = [row for row in range(10) if row not in reached]
    assert others
    assert torch.equal(out[others], torch.zeros_like(out[others]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_in_rows_and_groups_give_zeros_and_no_nan(backend: str) -> None:
    call = make_call("batched", RECIPES["16x32"], 3, 24, 70, 6, sentinels=0.0)
    x = call.arguments["x"]
    x[1], x[2, :32], x[3, 64:] = 0, 0, 0

    out = call.run(backend=backend)

    assert not out[1].any()
    oracle.assert_matches(out, call.truth(), min_sqnr=-math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["batched", "grouped"])
def test_no_rows_give_an_empty_output(backend: str, way: str) -> None:
    call = make_call(way, ROW, 3, 8, 16, 0)

    assert call.run(backend=backend).shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gather_from_no_rows_gives_zeros(backend: str) -> None:
    call = make_call("batched", ROW, 3, 8, 16, 4)
    x = torch.empty(0, 16)

    out = call.run(backend=backend, x=x, gather=torch.zeros(4, dtype=torch.int64))

    assert torch.equal(out, torch.zeros(4, 8))


def test_both_ways_agree_bit_for_bit_in_triton() -> None:
    """A batched call is a grouped one that sorts, so decode and prefill give one answer."""
    batched = make_call("batched", BLOCK_128, 6, 40, 136, 14, sentinels=0.2)
    ids = batched.arguments["expert_ids"]
    sorted_rows = fp8dispatch.moe.routing.sort_by_expert(ids, 6)

    out = fp8_experts_grouped(
        batched.arguments["x"],
        batched.arguments["weight"],
        batched.arguments["weight_scale"],
        sorted_rows.ends,
        gather=sorted_rows.gather,
        scatter=sorted_rows.scatter,
        backend="triton",
    )

    assert torch.equal(out, batched.run(backend="triton"))


def test_autocast_gives_the_output_dtype() -> None:
    call = make_call("batched", ROW, 3, 8, 16, 4, x_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call.run().dtype == torch.bfloat16
        assert call.run(out_dtype=torch.float32).dtype == torch.float32


def test_meta_tensors_give_a_meta_tensor() -> None:
    call = make_call("grouped-index", ROW, 3, 8, 16, 6)
    arguments: dict[str, Any] = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }

    out = fp8_experts_grouped(**arguments)

    assert out.is_meta
    assert out.shape == (6, 8)


def test_the_public_names_are_at_the_root() -> None:
    assert fp8dispatch.fp8_experts_batched is fp8_experts_batched
    assert fp8dispatch.fp8_experts_grouped is fp8_experts_grouped
