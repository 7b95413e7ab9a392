"""One property: whatever the shapes, strides, dtypes and recipe, outputs and gradients are right.

`make test` draws a few examples, the same each time. `HYPOTHESIS_PROFILE=full` draws 5000 new ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from fp8dispatch import AmbiguousRecipeError, ShapeError, fp8_linear
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, SCALE_DTYPES
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe, infer_recipe
from tests import oracle

pytest.importorskip("hypothesis", reason="the GPU machine keeps its own packages")

from hypothesis import event, given
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Rows of fewer columns, or sums of fewer products, can cancel; see oracle.assert_matches.
_FEW = 16

_WEIGHT_LAYOUTS = ("dense", "column-major", "sliced", "stepped", "[K, N]")


@dataclass(frozen=True)
class Case:
    """One call, as plain data, so that a failing example reads well."""

    seed: int
    leading: tuple[int, ...]
    n: int
    k: int
    recipe: Recipe
    stated: str
    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    scale_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    out_dtype: torch.dtype | None
    static: bool
    x_layout: str
    weight_layout: str
    scale_layout: str
    magnitude: float


_groups = st.sampled_from([32, 64, 128]).map(lambda g: Recipe(Granularity.BLOCK, (1, g)))
_blocks = st.tuples(st.integers(1, 160), st.integers(1, 200)).map(
    lambda size: Recipe(Granularity.BLOCK, size)
)
_leading = st.one_of(
    st.integers(0, 40).map(lambda m: (m,)),
    st.just(()),
    st.tuples(st.integers(0, 5), st.integers(1, 8)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    recipe = draw(st.one_of(st.sampled_from([TENSOR, ROW, BLOCK_128]), _groups, _blocks))
    recognised = recipe.block_size is None or recipe in (
        BLOCK_128,
        *(Recipe(Granularity.BLOCK, (1, g)) for g in (32, 64, 128)),
    )
    ways = ["argument", "weight", "scale"] if recipe.block_size is not None else []
    return Case(
        seed=draw(st.integers(0, 2**31)),
        leading=draw(_leading),
        n=draw(st.integers(1, 300)),
        k=draw(st.integers(1, 400)),
        recipe=recipe,
        stated=draw(st.sampled_from(ways + ["inferred"] * recognised)),
        x_dtype=draw(st.sampled_from(ACTIVATION_DTYPES)),
        weight_dtype=draw(st.sampled_from(FLOAT8_DTYPES)),
        scale_dtype=draw(st.sampled_from(SCALE_DTYPES)),
        bias_dtype=draw(st.sampled_from([None, *ACTIVATION_DTYPES])),
        out_dtype=draw(st.sampled_from([None, *ACTIVATION_DTYPES])),
        static=draw(st.booleans()),
        x_layout=draw(st.sampled_from(["dense", "transposed", "sliced", "stepped", "expanded"])),
        weight_layout=draw(
            st.sampled_from(["dense", "column-major", "sliced", "stepped", "[K, N]"])
        ),
        scale_layout=draw(st.sampled_from(["dense", "column-major", "stepped"])),
        magnitude=draw(st.sampled_from([0.5, 1.0, 8.0])),
    )


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides; what lies between them is NaN (bytes: the largest)."""
    if layout == "dense" or tensor.dim() == 0:
        return tensor
    if layout in ("column-major", "transposed"):
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if layout == "expanded":  # every row of the last leading dimension is the first one
        return tensor[..., :1, :].expand_as(tensor) if tensor.dim() > 1 else tensor
    step = 2 if layout == "stepped" else 1
    room = (*(size + 3 for size in tensor.shape[:-1]), step * tensor.shape[-1] + 5)
    whole = torch.empty(room, dtype=tensor.dtype, device=tensor.device)
    whole.view(torch.uint8).fill_(0xFF)
    inner = whole[(*(slice(1, 1 + size) for size in tensor.shape[:-1]), slice(3, None))]
    view = inner[..., : step * tensor.shape[-1] : step]
    view.copy_(tensor)
    return view


def is_ambiguous(case: Case, scale: torch.Tensor) -> bool:
    """Beside a weight [K, N], a scale that means something as it is and when transposed."""
    if scale.dim() < 2 or scale.numel() == 1:
        return False
    stated = None if case.stated == "inferred" else case.recipe.block_size
    readings = 0
    for shape in (tuple(scale.shape), tuple(scale.shape)[::-1]):
        try:
            infer_recipe((case.n, case.k), shape, stated)
        except ShapeError:
            continue
        readings += 1
    return readings == 2


@given(cases())
def test_outputs_and_gradients_are_right(case: Case) -> None:
    torch.manual_seed(case.seed)
    dense, scale = oracle.make_weight(
        case.n,
        case.k,
        case.recipe,
        dtype=case.weight_dtype,
        scale_dtype=case.scale_dtype,
        device=DEVICE,
    )
    values = torch.randn(*case.leading, case.k, device=DEVICE) * case.magnitude
    x = laid_out(values.to(case.x_dtype), case.x_layout).requires_grad_()
    bias = None
    if case.bias_dtype is not None:
        bias = torch.randn(case.n, device=DEVICE).to(case.bias_dtype).requires_grad_()
    # Values above twice the magnitude are clamped.
    static = torch.full((1,), 2 * case.magnitude / 448, device=DEVICE) if case.static else None
    flip = case.weight_layout == "[K, N]" and case.n != case.k
    weight = dense.t() if flip else laid_out(dense, case.weight_layout.replace("[K, N]", "dense"))
    passed_scale = laid_out(scale, case.scale_layout)
    if flip and scale.dim() == 2:
        passed_scale = passed_scale.t()
    if case.stated in ("weight", "scale"):
        holder = weight if case.stated == "weight" else passed_scale
        holder.block_size = case.recipe.block_size  # type: ignore[attr-defined]
    block_size = case.recipe.block_size if case.stated == "argument" else None

    def call() -> torch.Tensor:
        return fp8_linear(
            x,
            weight,
            passed_scale,
            bias,
            block_size=block_size,
            activation_scale=static,
            out_dtype=case.out_dtype,
            backend="eager",
        )

    if flip and is_ambiguous(case, scale):
        event("ambiguous")
        with pytest.raises(AmbiguousRecipeError):
            call()
        return
    event(f"{case.recipe.granularity.value}, {case.stated}")
    out = call()

    assert out.shape == (*case.leading, case.n)
    assert out.dtype == (case.out_dtype or case.x_dtype)
    if out.numel():
        expected = oracle.linear_truth(x, dense, scale, case.recipe, bias, static)
        plenty = case.n >= _FEW and case.k >= _FEW
        oracle.assert_matches(out, expected, min_sqnr=None if plenty else -math.inf)

    grad = torch.randn(out.shape, device=DEVICE).to(out.dtype)
    wanted = [x] if bias is None else [x, bias]
    grad_x, *grad_bias = torch.autograd.grad(out, wanted, grad)

    assert grad_x.shape == x.shape
    assert grad_x.dtype == x.dtype
    true_weight = oracle.dequantized_weight(dense, scale, case.recipe)
    plenty = case.n >= _FEW and case.k >= _FEW
    oracle.assert_gradient(
        grad_x, grad, true_weight, min_sqnr=oracle.MIN_SQNR_GRAD if plenty else -math.inf
    )
    if bias is not None:
        oracle.assert_bias_gradient(grad_bias[0], grad, bias)
