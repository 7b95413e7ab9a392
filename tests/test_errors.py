"""Malformed calls: each is one sentence of the project's own exception tree, and computes nothing.

The tables read ``call -> class: words``. The class is exact; the words are what the message must
say, "..." standing for anything. Calls are evaluated here, with every public name of the package.
"""

from __future__ import annotations

import builtins
import gc
import re
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import fp8dispatch
from fp8dispatch import dequantized_grad, errors, fp8_linear, prepare
from fp8dispatch.backends.cublaslt import CuBlasLt
from fp8dispatch.backends.eager import Eager
from fp8dispatch.backends.triton import Triton
from fp8dispatch.quantization import activation as activation_quantizer
from fp8dispatch.quantization import eager as arithmetic
from fp8dispatch.quantization import weight as weight_quantizer
from fp8dispatch.recipe import BLOCK_128

if TYPE_CHECKING:
    from collections.abc import Callable

E4M3, E5M2, E4M3FNUZ = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz
NAN, INF = float("nan"), float("inf")
ones, vmap, Sequential = torch.ones, torch.func.vmap, torch.nn.Sequential
X, W, S = ones(2, 384), ones(256, 384).to(E4M3), ones(2, 3)  # N = 256, K = 384, blocks of 128
FLAT = ones(256, 250).to(E4M3).t()  # a transposed weight whose grid of blocks is square
ROWS, ONE = ones(256), ones(1)
XQ = X.to(E4M3)


def linear(face: Callable[..., Any] = fp8_linear, **changes: Any) -> Any:
    """A right call of `fp8_linear` or `explain`, but for `changes`."""
    return face(**{"X": X, "weight": W, "weight_scale": S, **changes})


def shared(data: Any = XQ, scale: Any = S, **changes: Any) -> Any:
    """A right call of `fp8_linear_quantized`, but for the changes."""
    activations = fp8dispatch.QuantizedActivation(data, scale)
    return linear(fp8dispatch.fp8_linear_quantized, X=activations, **changes)


def noted(tensor: torch.Tensor, block_size: Any) -> torch.Tensor:
    """A copy that carries ``block_size``, as loaders of checkpoints leave it on tensors."""
    tensor = tensor.clone()
    tensor.block_size = block_size
    return tensor


def holding(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Block scales with one wrong value, in the last place."""
    scale = S.to(dtype, copy=True)
    scale[-1, -1] = value
    return scale


def e8m0(byte: int, *shape: int) -> torch.Tensor:
    return torch.full(shape, byte, dtype=torch.uint8)


def layer(value: float = 1.0, **options: Any) -> torch.nn.Linear:
    made = torch.nn.Linear(8, 4, **options)
    torch.nn.init.constant_(made.weight, value)
    return made


def batched(call: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
    """`call` under vmap, over a batch of one."""
    return vmap(call)(tensor[None])


CALLS = """
linear(X=None) -> DTypeError: X must be a torch.Tensor, found NoneType
linear(weight=np.ones((256, 384))) -> DTypeError: weight must be a torch.Tensor, found ndarray
linear(weight_scale=None) -> DTypeError: weight_scale must be a torch.Tensor, found NoneType
linear(bias=[0.0]) -> DTypeError: bias must be a torch.Tensor, found list
linear(activation_scale=0.5) -> DTypeError: activation_scale must be a torch.Tensor, found float
linear(X=X.double()) -> DTypeError: X must be one of bfloat16, float16, float32, found float64
linear(X=XQ) -> DTypeError: X must be ... found float8_e4m3fn; ... fp8_linear_quantized
linear(weight=W.bfloat16()) -> DTypeError: weight must be ... found bfloat16; ... quantize
linear(weight=W.view(torch.uint8)) -> DTypeError: weight must be ... found uint8; ... .view(
linear(weight=W.view(torch.int8)) -> DTypeError: weight must be ... found int8; ... .view(
linear(weight_scale=S.double()) -> DTypeError: weight_scale must be ... found float64
linear(weight_scale=S.int()) -> DTypeError: weight_scale must be ... found int32
linear(bias=ROWS.double()) -> DTypeError: bias must be ... found float64
linear(activation_scale=ONE.double()) -> DTypeError: activation_scale must be ... found float64
linear(X=X.to_sparse()) -> DTypeError: X must be dense ... found torch.sparse_coo; pass X.to_dense()
linear(X=X.to_sparse_csr()) -> DTypeError: X must be dense ... found torch.sparse_csr
linear(weight_scale=S.to_sparse_csr()) -> DTypeError: weight_scale must be dense ... sparse_csr
linear(bias=ROWS.to_sparse()) -> DTypeError: bias must be dense ... found torch.sparse_coo
linear(activation_scale=ONE.to_sparse()) -> DTypeError: activation_scale must be dense
linear(X=torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)) -> DTypeError: X ... quantized one
linear(X=X.to("meta")) -> DeviceError: X must be on the weight's device cpu, found meta
linear(weight_scale=S.to("meta")) -> DeviceError: weight_scale ... device cpu, found meta
linear(bias=ROWS.to("meta")) -> DeviceError: bias ... device cpu, found meta
linear(activation_scale=ONE.to("meta")) -> DeviceError: activation_scale ... cpu, found meta
linear(X=torch.tensor(1.0)) -> ShapeError: X must be [..., K] with at least one column, found []
linear(X=ones(2, 100)) -> ShapeError: X has K=100 columns and needs a weight [N, 100] ... [256, 384]
linear(X=X[:, :0]) -> ShapeError: at least one column, found [2, 0]
linear(weight=W[0]) -> ShapeError: weight must be a matrix [N, K], found shape [384]
linear(weight=W[None]) -> ShapeError: weight must be a matrix [N, K], found shape [1, 256, 384]
linear(weight=W[:0]) -> ShapeError: weight must not be empty, found shape [0, 384]
linear(X=X[:, :0], weight=W[:, :0]) -> ShapeError: at least one column, found [2, 0]
linear(weight_scale=ones(2, 2)) -> ShapeError: [2, 3] (blocks of 128x128), ... found [2, 2]; ...
linear(weight_scale=ones(384)) -> ShapeError: [256] or [256, 1] (per-row), ... found [384]
linear(weight_scale=ones(256, 5)) -> ShapeError: [256, 12] (groups of 32; ...), found [256, 5]
linear(weight_scale=ones(0)) -> ShapeError: [1] (per-tensor), ... found [0]
linear(weight_scale=ones(2, 3, 1)) -> ShapeError: at most 2 dimensions, found shape [2, 3, 1]
linear(weight_scale=ones(3, 2)) -> ShapeError: found [3, 2]; it fits when transposed: ... .t()
linear(weight_scale=ROWS[None]) -> ShapeError: found [1, 256]; it fits when transposed: ... .t()
linear(X=ones(2, 250), weight=FLAT, weight_scale=ones(2, 2))
    -> AmbiguousRecipeError: [250, 256] ... [2, 2] fits both transposed ... and as it is ... [N, K]
linear(X=ones(2, 250), weight=FLAT, weight_scale=ones(5, 7)) -> ShapeError: found [7, 5]
linear(bias=ROWS[:3]) -> ShapeError: bias must be [256], ... found [3]
linear(bias=ROWS[:, None]) -> ShapeError: bias must be [256], ... found [256, 1]
linear(activation_scale=ones(2)) -> ShapeError: activation_scale must have one element ... found [2]
linear(block_size="128") -> DTypeError: block_size must be two integers ... found '128'
linear(block_size=128) -> DTypeError: block_size must be two integers ... found 128
linear(block_size=(128.0, 128.0)) -> DTypeError: two integers ... found (128.0, 128.0)
linear(block_size=(1, 2, 3)) -> DTypeError: two integers ... found (1, 2, 3)
linear(block_size=(128, 0)) -> ShapeError: block_size must be positive, found (128, 0)
linear(block_size=(64, 64)) -> ShapeError: (64, 64) ... needs a weight_scale [4, 6], found [2, 3]
linear(weight_scale=ROWS, block_size=(128, 128))
    -> ShapeError: needs a weight_scale [2, 3], found [256], which reads as per-row; drop block_size
linear(weight_scale=ONE, block_size=(128, 128)) -> ShapeError: found [1], ... per-tensor; drop
linear(weight=noted(W, 128)) -> DTypeError: two integers ... found 128
linear(weight=noted(W, (128, 128)), weight_scale=noted(S, (64, 64)))
    -> AmbiguousRecipeError: weight.block_size is (128, 128) and weight_scale.block_size is (64, 64)
linear(weight_scale=holding(NAN)) -> ScaleValueError: weight_scale ... found nan among 1 of 6 values
linear(weight_scale=holding(INF)) -> ScaleValueError: weight_scale ... found inf among 1 of 6 values
linear(weight_scale=holding(-1)) -> ScaleValueError: weight_scale ... found -1.0 among 1 of 6 values
linear(weight_scale=holding(-INF, torch.bfloat16)) -> ScaleValueError: weight_scale ... found -inf
linear(weight_scale=e8m0(255, 2, 3)) -> ScaleValueError: weight_scale ... found nan among 6 of 6
linear(weight_scale=e8m0(255, 2, 3).view(torch.float8_e8m0fnu)) -> ScaleValueError: found nan
linear(activation_scale=ONE * 0) -> ScaleValueError: activation_scale ... positive, found 0.0
linear(activation_scale=ONE * -1) -> ScaleValueError: activation_scale ... found -1.0
linear(activation_scale=e8m0(255, 1)) -> ScaleValueError: activation_scale ... found nan
linear(backend="deepgem") -> UnknownBackendError: eager or None, found 'deepgem'
linear(backend="EAGER") -> UnknownBackendError: found 'EAGER'
linear(backend="eager,triton") -> UnknownBackendError: found 'eager,triton'
linear(backend="cublaslt")
    -> BackendUnavailableError: argument backend= ... cublaslt needs a CUDA device ... found cpu
linear(out_dtype=torch.float64) -> DTypeError: out_dtype must be ... found torch.float64
linear(out_dtype="bfloat16") -> DTypeError: out_dtype must be ... found 'bfloat16'
batched(lambda x: linear(X=x), X) -> UnsupportedTransformError: vmap ... X takes any leading shape
batched(shared, XQ) -> UnsupportedTransformError: vmap ... X takes any leading shape
vmap(torch.func.grad(lambda x: linear(X=x).sum()))(X) -> UnsupportedTransformError: torch.func.vmap
linear(explain, X=None) -> DTypeError: X must be a torch.Tensor, found NoneType
linear(explain, backend="cublaslt") -> BackendUnavailableError: cublaslt needs ... found cpu
linear(fp8_linear_quantized, X=XQ) -> DTypeError: must be a QuantizedActivation, found Tensor; make
shared(scale=ones(2, 1)) -> ShapeError: activation scales [2, 3] or one element, found [2, 1]
shared(scale=ones(3, 2)) -> ShapeError: activation scales [2, 3] or one element, found [3, 2]
shared(weight_scale=ROWS) -> ShapeError: row weight ... scales [2, 1] or one element, found [2, 3]
shared(data=X.to(E5M2)) -> DTypeError: must be float8_e4m3fn, found float8_e5m2
shared(weight=W.float().to(E4M3FNUZ)) -> DTypeError: must be float8_e4m3fnuz, found float8_e4m3fn
shared(data=XQ[:, :100]) -> ShapeError: K=100 columns ... found [256, 384]
shared(scale=S.to("meta")) -> DeviceError: X.scale ... found meta
shared(scale=S.clone().requires_grad_()) -> FrozenWeightError: no gradient; pass the unquantised X
shared(out_dtype="bfloat16") -> DTypeError: out_dtype must be ... found 'bfloat16'
QuantizedActivation(None, S)
    -> DTypeError: QuantizedActivation.data must be a torch.Tensor, found None
QuantizedActivation(X, S)
    -> DTypeError: QuantizedActivation.data must be one of float8_e4m3fn ... found float32
QuantizedActivation(XQ, S.bfloat16()) -> DTypeError: must be float32, found bfloat16
QuantizedActivation(XQ[0, 0], S) -> ShapeError: must be [..., K] with at least one column, found []
QuantizedActivation.from_tensor(XQ) -> DTypeError: x must be one of ... found float8_e4m3fn
QuantizedActivation.from_tensor(X, dtype=torch.int8)
    -> DTypeError: dtype must be one of torch.float8_e4m3fn ... found torch.int8
QuantizedActivation.from_tensor(X, group_size=-1) -> ShapeError: positive integer, found -1
QuantizedActivation.from_tensor(X, scale=ones(2))
    -> ShapeError: one element for all activations, found [2]
QuantizedActivation.from_tensor(X, scale=ONE * -1) -> ScaleValueError: positive, found -1.0
quantize(None) -> DTypeError: must be a torch.Tensor, found NoneType
quantize(W) -> DTypeError: must be one of bfloat16, float16, float32, found float8_e4m3fn
quantize(X[0]) -> ShapeError: must be a matrix [N, K] that is not empty, found shape [384]
quantize(X.to_sparse()) -> DTypeError: must be dense (torch.strided), found torch.sparse_coo; pass
quantize(X * NAN) -> NumericalOverflowError: needs finite values, found NaN or infinity
quantize(X * 1e30, scale_dtype=torch.float16) -> NumericalOverflowError: float16 ... 1e+30
quantize(X, "blocks") -> InvalidInputError: one of tensor, row, block, found 'blocks'
quantize(X, "row", block_size=(1, 1)) -> InvalidInputError: only the block recipe ... 'row'
quantize(X, BLOCK_128, block_size=(64, 64)) -> InvalidInputError: (64, 64) contradicts block 128x128
quantize(X, dtype=torch.int8) -> DTypeError: dtype must be one of ... found torch.int8
quantize(X, scale_dtype=torch.float64) -> DTypeError: scale_dtype must be ... found torch.float64
Recipe(Granularity.ROW, (1, 1)) -> InvalidInputError: found row with block_size=(1, 1)
dequantize(W, None) -> DTypeError: scale must be a torch.Tensor, found NoneType
dequantize(X, S) -> DTypeError: data must be one of float8_e4m3fn, ... found float32
dequantize(W, S.int()) -> DTypeError: scale must be ... found int32
dequantize(W[0], S) -> ShapeError: data must be a matrix [N, K], found shape [384]
dequantize(W, S.t()) -> ShapeError: found [3, 2]; it fits when transposed
dequantize(W, holding(NAN)) -> ScaleValueError: found nan among 1 of 6 values
FP8Linear(8, 4, recipe="blocks") -> InvalidInputError: one of tensor, row, block, found 'blocks'
FP8Linear(8, 4, block_size="128") -> DTypeError: two integers ... found '128'
FP8Linear.from_linear(torch.nn.Conv1d(1, 1, 1)) -> DTypeError: torch.nn.Linear, found Conv1d
FP8Linear.from_linear(layer(NAN)) -> NumericalOverflowError: found NaN or infinity
FP8Linear.from_tensors(X, S) -> DTypeError: weight must be ... found float32
FP8Linear.from_tensors(W, S.t()) -> ShapeError: found [3, 2]; it fits when transposed
FP8Linear.from_tensors(W, S, ones(3)) -> ShapeError: bias must be [256], ... found [3]
FP8Linear.from_tensors(W, S, activation_scale=ones(2)) -> ShapeError: one element ... found [2]
FP8Linear.from_tensors(W, S.to("meta")) -> DeviceError: device cpu, found meta
convert_model(layer()) -> InvalidInputError: found Linear; use FP8Linear.from_linear
convert_model(Sequential(layer()), skip="lm_head") -> DTypeError: found 'lm_head'
convert_model(Sequential(layer(INF))) -> NumericalOverflowError: layer '0': ... found NaN
act_quant(X, 0) -> ShapeError: positive integer, found 0
fp8_act_quant(X.double()) -> DTypeError: x must be one of ... found float64
weight_dequant(W, S, block_size=128) -> DTypeError: two integers ... found 128
w8a8_block_fp8_matmul(X, W, S, S, [128, 128])
    -> DTypeError: data must be one of float8_e4m3fn ... found float32
w8a8_block_fp8_matmul(XQ, W, S, S, [64, 64]) -> ShapeError: [4, 6], found [2, 3]
w8a8_block_fp8_matmul_triton(XQ, W, S, ones(3, 2), [128, 128]) -> ShapeError: found [3, 2]
fp8_block_quant_linear(X, W, S.t()) -> ShapeError: found [3, 2]
fbgemm_fp8_linear(X, W, ROWS, ones(3)) -> ShapeError: bias must be [256], ... found [3]
FP8BlockQuantLinear.apply(X, W, None) -> DTypeError: weight_scale must be ... found NoneType
FbgemmFp8Linear_matmul.apply(X, W, ROWS, ones(3)) -> ShapeError: bias must be [256], ... found [3]
batched(lambda w: linear(weight=w), W) -> UnsupportedTransformError: vmap
batched(lambda s: linear(weight_scale=s), S) -> UnsupportedTransformError: vmap
batched(lambda b: linear(bias=b), ROWS) -> UnsupportedTransformError: vmap
linear(X=torch.nested.nested_tensor([X, X])) -> DTypeError: X must be
shared(scale=ones(6)) -> ShapeError: [2, 3] ... found [6]
QuantizedActivation.from_tensor(X.to_sparse()) -> DTypeError: dense ... sparse_coo
QuantizedActivation.from_tensor(X[:, :0]) -> ShapeError: [2, 0]
QuantizedActivation.from_tensor(X, scale=0.5) -> DTypeError: torch.Tensor, found float
QuantizedActivation.from_tensor(X, scale=ONE.int()) -> DTypeError: found int32
QuantizedActivation.from_tensor(X, scale=ONE.to("meta")) -> DeviceError: found meta
Recipe(Granularity.BLOCK, (-1, 0)) -> ShapeError: (-1, 0)
Recipe(Granularity.BLOCK, (1, 2, 3)) -> DTypeError: (1, 2, 3)
Recipe("row") -> DTypeError: 'row'
dequantize(W, S.to("meta")) -> DeviceError: found meta
dequantize(W, S.to_sparse()) -> DTypeError: dense ... sparse_coo
FP8Linear(8, 4, dtype=torch.bfloat16) -> DTypeError: found torch.bfloat16
FP8Linear(8, 4, scale_dtype=torch.int32) -> DTypeError: found torch.int32
FP8Linear(8, 4, backend="nope") -> UnknownBackendError: found 'nope'
FP8Linear(-1, 4) -> ShapeError: -1
FP8Linear(1.5, 4) -> DTypeError: 1.5
FP8Linear.from_linear(layer(), activation_scale=ones(2)) -> ShapeError: found [2]
FP8Linear.from_linear(layer(), backend="nope") -> UnknownBackendError: found 'nope'
convert_model(Sequential(layer()), backend="nope") -> UnknownBackendError: found 'nope'
convert_model(Sequential(layer()), skip=[1]) -> DTypeError: found 1
"""


def cases(table: str, *marks: pytest.MarkDecorator) -> list[Any]:
    """A parameter (call, class, words) for each entry of a table; an entry may take two lines."""
    entries = re.sub(r"\n +(?=->)", " ", table).split("\n")
    found = [re.fullmatch(r"(.+?) -> (\w+): (.+)", entry) for entry in entries if entry]
    assert all(found), "an entry reads: call -> class: words"
    return [pytest.param(*match.groups(), id=match[1], marks=marks) for match in found if match]


def unreachable(*args: Any, **options: Any) -> Any:
    raise AssertionError("a malformed call was computed")


@pytest.fixture
def nothing_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in fp8dispatch.__all__:
        getattr(fp8dispatch, name)  # what is imported later would keep the stand-ins for good
    for backend in (CuBlasLt, Eager, Triton):
        monkeypatch.setattr(backend, "linear", unreachable)
        monkeypatch.setattr(backend, "matmul", unreachable)
    monkeypatch.setattr(arithmetic, "cast", unreachable)
    monkeypatch.setattr(activation_quantizer, "quantize_activation", unreachable)
    monkeypatch.setattr(weight_quantizer, "dequantize_strip", unreachable)


def assert_refused(call: Callable[[], Any], error: str, words: str) -> None:
    expected = getattr(errors, error)
    with pytest.raises(errors.FP8DispatchError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is expected, f"{caught.type.__name__}: {message}"
    pattern = ".*".join(re.escape(part.strip()) for part in words.split(" ..."))
    assert re.search(pattern, message), message
    assert not re.search(r"[\n\r]|[.!?] +[A-Z]|\.$|Traceback|torch\._C", message), message
    assert len(message) < 350, message


@pytest.mark.filterwarnings("ignore")  # torch warns that CSR, quantized and nested are in beta
@pytest.mark.usefixtures("nothing_computes")
@pytest.mark.parametrize(("call", "error", "words"), cases(CALLS))
def test_malformed_call_is_refused_in_a_sentence(call: str, error: str, words: str) -> None:
    public = {name: getattr(fp8dispatch, name) for name in fp8dispatch.__all__}
    names = {**public, "BLOCK_128": BLOCK_128, "np": np, **globals()}
    assert_refused(lambda: eval(call, names), error, words)


@pytest.mark.parametrize("frozen", ["weight", "weight_scale", "activation_scale"])
def test_gradient_of_a_frozen_tensor_is_refused_in_backward(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"weight": W.clone(), "weight_scale": S.clone(), "activation_scale": ONE.clone()}
    tensors[frozen].requires_grad_()
    out = linear(X=X.clone().requires_grad_(), **tensors)  # a Parameter asks by default: no error
    monkeypatch.setattr(dequantized_grad, "grad_input", unreachable)

    words = f"{frozen} requires grad, ... call {frozen}.requires_grad_(False)"
    assert_refused(out.sum().backward, "FrozenWeightError", words)


def test_batched_gradient_of_the_bias_is_refused() -> None:
    with pytest.raises(errors.UnsupportedTransformError):
        torch.func.jacrev(lambda bias: linear(bias=bias))(ROWS)


def test_tree_is_the_one_drawn() -> None:
    drawn: list[type] = []
    path: list[type] = []
    for prefix, name, builtin in re.findall(
        r"^ {4}([|` -]*)(\w+Error)(?: \((\w+)\))?", errors.__doc__ or "", re.MULTILINE
    ):
        del path[len(prefix) // 4 :]
        error = getattr(errors, name)
        expected = path[-1:] or [Exception]
        expected += [getattr(builtins, builtin)] if builtin else []
        assert list(error.__bases__) == expected, name
        path.append(error)
        drawn.append(error)
    raised = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert set(drawn) == set(raised)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the scales whose values were read, in order."""
    seen: list[str] = []
    real = prepare._check_values

    def note(scale: torch.Tensor, name: str, **options: Any) -> None:
        seen.append(name)
        real(scale, name, **options)

    monkeypatch.setattr(prepare, "_check_values", note)
    return seen


def test_scale_values_are_read_once(checks: list[str]) -> None:
    scale, static = S.clone(), ONE.clone()
    x = X.clone().requires_grad_()

    for _ in range(2):
        linear(X=x, weight_scale=scale, activation_scale=static).sum().backward()

    assert sorted(checks) == ["activation_scale", "weight_scale"]


def test_scale_values_are_read_once_through_views_made_anew(checks: list[str]) -> None:
    scale = S.clone()

    for _ in range(2):
        linear(weight=W.t(), weight_scale=scale.t())

    assert checks == ["weight_scale"]


def test_scale_changed_in_place_is_read_again(checks: list[str]) -> None:
    scale = S.clone()
    before = linear(weight_scale=scale)

    torch.testing.assert_close(linear(weight_scale=scale.mul_(2)), 2 * before)

    assert len(checks) == 2
    scale[0, 0] = NAN
    with pytest.raises(errors.ScaleValueError, match="found nan among 1 of 6"):
        linear(weight_scale=scale)


def test_invalidate_makes_an_uncounted_change_visible() -> None:
    scale = S.clone()
    before = linear(weight_scale=scale)
    scale.data.mul_(2)  # torch does not count this

    fp8dispatch.invalidate(scale)

    torch.testing.assert_close(linear(weight_scale=scale), 2 * before)


@pytest.mark.parametrize("make", [S.clone, S.bfloat16, lambda: e8m0(127, 2, 3), ROWS.clone])
def test_what_is_prepared_dies_with_the_scale(make: Callable[[], torch.Tensor]) -> None:
    scale = make()
    linear(weight_scale=scale)
    storage = weakref.ref(scale.untyped_storage())
    key = id(scale.untyped_storage())
    assert key in prepare._entries

    del scale
    gc.collect()

    assert storage() is None, "the cache keeps the scale alive"
    assert key not in prepare._entries
