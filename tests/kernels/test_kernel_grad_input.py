"""dX from the FP8 weight: the numbers of a dequantised weight and a matmul, without the weight."""

from __future__ import annotations

import pytest
import torch

from fp8dispatch import dequantized_grad, fp8_linear
from fp8dispatch.dequantized_grad import Way
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES
from fp8dispatch.kernels.grad_input import grad_input, tile_of
from fp8dispatch.quantization.weight import block_of
from fp8dispatch.recipe import Recipe
from tests import oracle
from tests.oracle import RECIPES, name_of

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
gradients = pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=name_of)


def run(
    grad: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, recipe: Recipe
) -> torch.Tensor:
    n, k = data.shape
    block = block_of(recipe, n, k)
    grid = scale.float().reshape(-(-n // block[0]), -(-k // block[1]))
    out = torch.empty(grad.shape[0], k, dtype=grad.dtype, device=grad.device)
    grad_input(grad, data, grid, out, block)
    return out


@gradients
@every_recipe
def test_every_recipe_and_dtype(recipe: Recipe, dtype: torch.dtype, device: str) -> None:
    data, scale = oracle.make_weight(75, 140, recipe, device=device)
    grad = torch.randn(19, 75, device=device).to(dtype)

    got = run(grad, data, scale, recipe)

    oracle.assert_gradient(got, grad, oracle.dequantized_weight(data, scale, recipe))


@pytest.mark.parametrize("weight_dtype", FLOAT8_DTYPES, ids=name_of)
def test_every_format(weight_dtype: torch.dtype, device: str) -> None:
    recipe = RECIPES["block-48x80"]
    data, scale = oracle.make_weight(50, 90, recipe, dtype=weight_dtype, device=device)
    grad = torch.randn(5, 50, device=device).bfloat16()

    got = run(grad, data, scale, recipe)

    oracle.assert_gradient(got, grad, oracle.dequantized_weight(data, scale, recipe))


@pytest.mark.parametrize("layout", ["transposed", "slice", "expanded", "every second row"])
def test_strided_gradient_weight_and_output(layout: str, device: str) -> None:
    recipe = RECIPES["row"]
    data, scale = oracle.make_weight(70, 100, recipe, device=device)
    data = data.view(torch.uint8)[3:67, 7:90].view(data.dtype)
    scale = scale[3:67]
    whole = torch.randn(128, 128, device=device).bfloat16()
    grad = {
        "transposed": whole[:64, :9].t(),
        "slice": whole[:9, 5:69],
        "expanded": whole[:1, :1].expand(9, 64),
        "every second row": whole[:18:2, :64],
    }[layout]
    canvas = torch.full((12, 200), torch.nan, device=device, dtype=torch.bfloat16)
    out = canvas[1:10, 2:168:2]

    grad_input(grad, data, scale, out, None)

    oracle.assert_gradient(out, grad, oracle.dequantized_weight(data, scale, recipe))
    assert canvas.isnan().sum().item() == canvas.numel() - out.numel()


def test_a_weight_is_rounded_to_the_gradients_dtype(device: str) -> None:
    """The unit matrix reads the weight back as the product took it: as `dequantize` gives it."""
    recipe = RECIPES["block-1x32"]
    data, scale = oracle.make_weight(16, 64, recipe, device=device)
    grad = torch.eye(16, device=device).bfloat16()

    got = torch.empty(16, 64, device=device)

    grad_input(grad, data, scale, got, recipe.block_size)

    spread = scale.repeat_interleave(32, 1)
    assert torch.equal(got, (data.float() * spread).bfloat16().float())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy meets the NaN
def test_a_non_finite_row_stays_in_its_row(device: str) -> None:
    recipe = RECIPES["block-128x128"]
    data, scale = oracle.make_weight(40, 50, recipe, device=device)
    grad = torch.randn(5, 40, device=device).bfloat16()
    clean = run(grad, data, scale, recipe)
    grad[2, 3] = torch.nan

    got = run(grad, data, scale, recipe)

    assert got[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(got[others], clean[others])


def test_no_rows_launch_nothing(device: str) -> None:
    data, scale = oracle.make_weight(16, 16, RECIPES["row"], device=device)

    got = run(torch.empty(0, 16, device=device), data, scale, RECIPES["row"])

    assert got.shape == (0, 16)


def test_tiles_fit_the_problem() -> None:
    assert tile_of(1, 10, 2)[:3] == (16, 64, 16)
    assert tile_of(40, 4096, 2)[:3] == (64, 64, 64)
    assert tile_of(4096, 4096, 2)[:3] == (128, 64, 128)
    assert tile_of(4096, 4096, 4)[:3] == (64, 32, 64)


@every_recipe
def test_backward_takes_the_kernel_where_kernels_run(
    recipe: Recipe, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU the interpreter stands in for a GPU that runs our kernels."""

    def strips(*arguments: object) -> torch.Tensor:
        raise AssertionError("the weight is materialised")

    monkeypatch.setattr(dequantized_grad, "ways", lambda *_: (Way.TRITON, Way.STRIPS))
    monkeypatch.setattr(dequantized_grad, "dequantize_strip", strips)
    weight, scale = oracle.make_weight(60, 70, recipe, device=device)
    x = torch.randn(2, 3, 70, device=device, dtype=torch.bfloat16, requires_grad=True)

    out = fp8_linear(x, weight, scale, block_size=recipe.block_size, backend="eager")
    grad = torch.randn(out.shape, device=device).bfloat16()
    (got,) = torch.autograd.grad(out, x, grad)

    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    oracle.assert_gradient(got, grad, oracle.dequantized_weight(weight, scale, recipe))


def test_the_ways_by_device_dtype_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    capability, gluon = (9, 0), True
    monkeypatch.setattr(dequantized_grad, "runs_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(dequantized_grad, "runs_gluon", lambda device: gluon)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def tried(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> str:
        return " ".join(way.value for way in dequantized_grad.ways(m, n, k, device, dtype))

    bf16 = torch.bfloat16
    assert tried(16, 4096, 2048, gpu, bf16) == "gluon strips"
    assert tried(16, 4096, 7168, gpu, torch.float16) == "gluon triton strips"
    assert tried(256, 4096, 2048, gpu, bf16) == "strips"
    assert tried(256, 4096, 7168, gpu, bf16) == "gluon strips"
    assert tried(4096, 4096, 7168, gpu, bf16) == "strips"
    assert tried(16, 24576, 1536, gpu, bf16) == "gluon strips", "few columns share no SMs"
    assert tried(16, 4096, 7168, gpu, torch.float32) == "strips", "torch.mm has its precision"
    assert tried(16, 4096, 7168, cpu, bf16) == "strips"
    gluon = False
    assert tried(16, 4096, 7168, gpu, bf16) == "triton strips"
    capability = (8, 9)
    assert tried(16, 4096, 7168, gpu, bf16) == "strips", "no kernel was seen to run there"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_kernel_and_strips_give_the_same_gradient(dtype: torch.dtype, device: str) -> None:
    recipe = RECIPES["block-64x128"]
    data, scale = oracle.make_weight(70, 150, recipe, device=device)
    grad = torch.randn(6, 70, device=device).to(dtype)
    wide = oracle.dequantized_weight(data, scale, recipe).float().to(dtype).double()
    exact, mass = grad.double() @ wide, grad.double().abs() @ wide.abs()
    # The kernel sums in fp32 and rounds once; cuBLAS may round partial sums to 16 bits between.
    for way, sums in ((Way.TRITON, 2.0**-20), (Way.STRIPS, torch.finfo(dtype).eps / 4)):
        got = dequantized_grad.grad_input(grad, data, scale, recipe, way).double()
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + sums * mass + 2.0**-24
        worst = ((got - exact).abs() / bound).max().item()
        assert worst <= 1, f"{way}: {worst:.2f} times the bound"
