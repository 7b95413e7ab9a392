"""The hub kernel's names of versions 1, 3 and 4: signatures, conventions, and no open bugs."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch

from fp8dispatch import DTypeError, InvalidInputError, ShapeError, quantize, quantize_experts
from fp8dispatch.integrations import finegrained_fp8 as hub
from fp8dispatch.recipe import Granularity, Recipe
from tests import oracle
from tests.moe import reference
from tests.oracle import RECIPES

BLOCK = RECIPES["block-128x128"]
SMALL = Recipe(Granularity.BLOCK, (64, 32))
TENSOR = RECIPES["tensor"]
E, N, K = 5, 200, 300  # ragged against every block

experts_functions = pytest.mark.parametrize("kind", ["batched", "grouped"])


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "fp8_act_quant": "x, block_size=128",
        "w8a8_fp8_matmul": "A, B, As, Bs, block_size, output_dtype=torch.float32",
        "w8a8_block_fp8_matmul": "A, B, As, Bs, block_size, output_dtype=torch.float32",
        "w8a8_tensor_fp8_matmul": "A, B, As, Bs, output_dtype=torch.float32",
        "w8a8_fp8_matmul_batched": "A, B, Bs, expert_ids, block_size",
        "w8a8_block_fp8_matmul_batched": "A, B, Bs, expert_ids, block_size",
        "w8a8_tensor_fp8_matmul_batched": "A, B, Bs, expert_ids",
        "w8a8_fp8_matmul_grouped": "A, B, Bs, offsets, tokens_per_expert, block_size",
        "w8a8_block_fp8_matmul_grouped": "A, B, Bs, offsets, tokens_per_expert, block_size",
        "w8a8_tensor_fp8_matmul_grouped": "A, B, Bs, offsets, tokens_per_expert",
        "matmul_2d": "A, B, Bs, block_size, output_dtype=None, activation_scale=None",
        "matmul_batched": "A, B, Bs, expert_ids, block_size, output_dtype=None",
        "matmul_grouped": "A, B, Bs, offsets, tokens_per_expert, block_size, output_dtype=None",
        **dict.fromkeys(
            ("moe_fused_batched", "moe_fused_grouped"),
            "hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, "
            "gate_up_proj_scale_inv, down_proj_scale_inv, block_size, act_fn=silu, "
            "swiglu_alpha=None, swiglu_limit=None, simulate_unfused=False",
        ),
    }.items(),
)
def test_signatures(name: str, parameters: str) -> None:
    signature = inspect.signature(getattr(hub, name))

    written = ", ".join(
        parameter.name
        if parameter.default is parameter.empty
        else f"{parameter.name}={parameter.default}"
        for parameter in signature.parameters.values()
    )
    assert written == parameters
    assert name in hub.__all__


def test_it_is_a_module_as_the_hub_gives_one() -> None:
    assert isinstance(hub, ModuleType)
    assert sorted(hub.__all__) == hub.__all__


def ends_of(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inclusive ends and counts as Transformers makes them, and the expert of each sorted row."""
    counts = torch.tensor(rows, dtype=torch.float32)  # of torch.histc on a CPU
    ids = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    return torch.cumsum(counts, 0, dtype=torch.int32), counts, ids


def expected_rows(
    x: torch.Tensor, ids: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, recipe: Recipe
) -> oracle.Truth:
    """What each row times the weight of its expert should give; zero for unknown ids."""
    weights = [
        oracle.dequantized_weight(one, multipliers, recipe)
        for one, multipliers in zip(data, scale, strict=True)
    ]
    rows = oracle.dequantized_activations(x, recipe)
    known = [0 <= int(one) < len(data) for one in ids]
    truths = [
        oracle.truth(rows[i : i + 1], weights[int(one)] if ok else weights[0] * 0)
        for i, (one, ok) in enumerate(zip(ids, known, strict=True))
    ]
    return oracle.Truth(
        torch.cat([truth.value for truth in truths]), torch.cat([truth.mass for truth in truths])
    )


def call(
    kind: str, prefix: str, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The function of this kind on rows of uneven experts; its output and each row's expert.

    The rows behind the last end, and a few ids below 0 and above E, are of no expert.
    """
    ends, counts, ids = ends_of([3, 0, 1, 5, 2])
    if kind == "grouped":
        tail = torch.full((len(x) - len(ids),), E)
        function = getattr(hub, f"{prefix}_grouped")
        return function(x, data, scale, ends, counts, *rest), torch.cat([ids, tail])
    mixed = torch.cat([ids, torch.tensor([-1, E, 2**31 - 1])])[torch.randperm(len(x))]
    strided = torch.stack([mixed, mixed + 1], 1)[:, 0].to(torch.int32)
    strided = torch.stack([strided, strided], 1)[:, 0]  # every second element of its memory
    function = getattr(hub, f"{prefix}_batched")
    return function(x, data, scale, strided, *rest), mixed


@experts_functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("prefix", ["w8a8_block_fp8_matmul", "w8a8_fp8_matmul", "matmul"])
@pytest.mark.parametrize("recipe", [BLOCK, SMALL], ids=str)
def test_blocks_of_experts(kind: str, dtype: torch.dtype, prefix: str, recipe: Recipe) -> None:
    data, scale = quantize_experts(torch.randn(E, N, K), recipe)
    x = torch.randn(14, K).to(dtype)

    out, ids = call(kind, prefix, x, data, scale, list(recipe.block_size or ()))

    assert (out.shape, out.dtype) == ((14, N), dtype)
    truth = expected_rows(x, ids, data, scale, recipe)
    oracle.assert_matches(out, truth)
    assert not out[(ids < 0) | (ids >= E)].any()


@experts_functions
@pytest.mark.parametrize(
    ("prefix", "rest"),
    [
        ("w8a8_tensor_fp8_matmul", ()),
        ("w8a8_fp8_matmul", (None,)),
        ("w8a8_fp8_matmul", ([N, K],)),
        ("matmul", (None,)),
        ("matmul", ([N, K],)),
    ],
)
@pytest.mark.parametrize("shape", [(E,), (E, 1, 1), (1,)], ids=str)
def test_one_scale_for_each_expert(
    kind: str, prefix: str, rest: tuple[Any, ...], shape: tuple[int, ...]
) -> None:
    """N and K are no multiples of 128, where the hub writes into the rows of other tokens."""
    data, scale = quantize_experts(torch.randn(E, N, K) * 3, TENSOR)
    scale = scale if len(shape) > 1 or shape[0] == E else scale[:1]
    x = torch.randn(14, K)

    out, ids = call(kind, prefix, x, data, scale.reshape(shape), *rest)

    spread = scale.reshape(-1).expand(E).reshape(E, 1)
    oracle.assert_matches(out, expected_rows(x, ids, data, spread, TENSOR))


@experts_functions
def test_an_output_dtype_and_a_gradient(kind: str) -> None:
    """Versions 1 to 4 have neither a gradient nor, in version 1, another dtype."""
    data, scale = quantize_experts(torch.randn(E, N, K), SMALL)
    x = torch.randn(14, K, dtype=torch.bfloat16, requires_grad=True)

    out, ids = call(kind, "matmul", x, data, scale, [64, 32], torch.float32)
    grad = torch.randn(14, N)
    out.backward(grad)

    assert out.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    for index, one in enumerate(ids.tolist()):
        if not 0 <= one < E:
            assert not x.grad[index].any()
            continue
        weight = oracle.dequantized_weight(data[one], scale[one], SMALL)
        oracle.assert_gradient(x.grad[index : index + 1], grad[index : index + 1], weight)


@experts_functions
@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8], ids=str)
@pytest.mark.parametrize("recipe", [BLOCK, RECIPES["block-1x32"]], ids=str)
def test_e8m0_scales(kind: str, stored: torch.dtype, recipe: Recipe) -> None:
    """Groups of 32 are MXFP8 in version 4, which then does not look at the block size."""
    data, scale = quantize_experts(torch.randn(E, N, 320), recipe, scale_dtype=stored)
    x = torch.randn(14, 320)

    out, ids = call(kind, "matmul", x, data, scale, [128, 128])

    oracle.assert_matches(out, expected_rows(x, ids, data, scale, recipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", [BLOCK, SMALL, TENSOR], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_matmul_2d(dtype: torch.dtype, recipe: Recipe, static: bool) -> None:
    """Static activations hold for tensor-wide weights too, where version 4 passes them over."""
    weight, scale = oracle.make_weight(N, K, recipe)
    x = torch.randn(2, 7, K).to(dtype)
    given = torch.tensor([0.02]) if static else None
    block = None if recipe is TENSOR else list(recipe.block_size or ())

    out = hub.matmul_2d(x, weight, scale, block, activation_scale=given)

    assert (out.shape, out.dtype) == ((2, 7, N), dtype)
    oracle.assert_matches(
        out, oracle.linear_truth(x, weight, scale, recipe, activation_scale=given)
    )
    if recipe is TENSOR:
        again = hub.matmul_2d(x, weight, scale.reshape(()), [N, K], activation_scale=given)
        assert torch.equal(out, again)


def test_matmul_2d_keeps_its_dtype_under_autocast_and_has_a_gradient() -> None:
    weight, scale = oracle.make_weight(N, K, BLOCK)
    x = torch.randn(3, K, requires_grad=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hub.matmul_2d(x, weight, scale, [128, 128])
    out.sum().backward()

    assert out.dtype == torch.float32
    assert x.grad is not None


@pytest.mark.parametrize("block_size", [None, [N, K]])
@pytest.mark.parametrize("lead", [(7,), (2, 3)])
def test_tensor_wide_operands(block_size: list[int] | None, lead: tuple[int, ...]) -> None:
    weight, scale = oracle.make_weight(N, K, TENSOR)
    x = torch.randn(*lead, K)
    data, per_row = hub.fp8_act_quant(x, K)
    truth = oracle.linear_truth(x, weight, scale, TENSOR)

    outs = [
        hub.w8a8_tensor_fp8_matmul(data, weight, per_row, scale),
        hub.w8a8_tensor_fp8_matmul(data, weight, per_row.squeeze(-1), scale.reshape(())),
        hub.w8a8_tensor_fp8_matmul(data, weight, per_row.flatten(), scale.reshape(1, 1)),
        hub.w8a8_fp8_matmul(data, weight, per_row, scale, block_size),
    ]

    for out in outs:
        assert (out.shape, out.dtype) == ((*lead, N), torch.float32)
        oracle.assert_matches(out, truth)
    blocks, grid = quantize(torch.randn(N, K), SMALL)
    grouped = hub.w8a8_fp8_matmul(
        *(hub.fp8_act_quant(x, 32)[0], blocks, hub.fp8_act_quant(x, 32)[1]), grid, [64, 32]
    )
    oracle.assert_matches(grouped, oracle.linear_truth(x, blocks, grid, SMALL))


@experts_functions
@pytest.mark.parametrize(
    ("alpha", "limit", "act"),
    [(None, None, "silu"), (None, 0.7, "silu"), (1.702, 0.7, "silu"), (None, None, "gelu")],
)
def test_fused_experts(kind: str, alpha: float | None, limit: float | None, act: str) -> None:
    hidden, inner, tokens = 96, 64, 12
    gate_up, gate_up_scale = quantize_experts(torch.randn(E, 2 * inner, hidden) * 0.1, SMALL)
    down, down_scale = quantize_experts(torch.randn(E, hidden, inner) * 0.1, SMALL)
    x = torch.randn(tokens, hidden)
    ids, weights = reference.routed(tokens, 2, E)
    ids[0, 0] = E

    out = getattr(hub, f"moe_fused_{kind}")(
        x,
        ids,
        weights,
        gate_up,
        down,
        gate_up_scale,
        down_scale,
        [64, 32],
        act_fn=act,
        swiglu_alpha=alpha,
        swiglu_limit=limit,
    )

    def gated(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        if limit is not None:
            gate, up = torch.clamp_max(gate, limit), torch.clamp(up, -limit, limit)
        if alpha is not None:
            return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)
        if act == "gelu":
            return gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up
        return gate / (1 + torch.exp(-gate)) * up

    def dequantized(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        pairs = zip(data, scale, strict=True)
        return torch.stack([oracle.dequantized_weight(d, s, SMALL) for d, s in pairs])

    plain = reference.Experts(
        dequantized(gate_up, gate_up_scale),
        dequantized(down, down_scale),
        gated,
        between=lambda rows, _: oracle.dequantized_activations(rows.float(), SMALL),
    )
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert oracle.sqnr(out, plain(x.double(), ids, weights.double())).min() > 90


@experts_functions
def test_what_is_refused(kind: str) -> None:
    data, scale = quantize_experts(torch.randn(E, N, 320), TENSOR)
    x = torch.randn(14, 320)

    with pytest.raises(DTypeError, match="packed FP4"):
        call(kind, "matmul", x, data.view(torch.int8), scale, None)
    with pytest.raises(ShapeError, match="must hold 1 or 5 scales"):
        call(kind, "matmul", x, data, torch.ones(E, 2, 1), None)
    with pytest.raises(ShapeError, match="block_size"):
        call(kind, "matmul", x, data, scale, [128, 128])
    with pytest.raises(ShapeError, match="K=320"):
        call(kind, "matmul", x, data[:, :, :300], scale, None)
    with pytest.raises(InvalidInputError, match="expert activation must be one of"):
        getattr(hub, f"moe_fused_{kind}")(
            x, torch.zeros(14, 1).long(), torch.ones(14, 1), data, data, scale, scale, None, "selu"
        )
