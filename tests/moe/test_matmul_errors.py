"""Malformed expert matmuls: each one sentence that says what was needed and found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from fp8dispatch import (
    BackendUnavailableError,
    DeviceError,
    DTypeError,
    FP8DispatchError,
    InvalidInputError,
    ScaleValueError,
    ShapeError,
    UnknownBackendError,
    UnsupportedTransformError,
)
from fp8dispatch.moe.validate import MOST_ROWS
from fp8dispatch.recipe import BLOCK_128, ROW
from tests.moe.cases import Call, make_call


def call_of(way: str) -> Call:
    return make_call(way, ROW, 3, 8, 16, 6, bias=torch.float32)


MALFORMED: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], type, str]] = {
    "x-not-a-tensor": ("batched", lambda a: {"x": [1.0]}, DTypeError, "x must be a torch.Tensor"),
    "x-integers": ("batched", lambda a: {"x": a["x"].long()}, DTypeError, "found int64"),
    "x-3d": ("batched", lambda a: {"x": a["x"][None]}, ShapeError, "x must be a matrix"),
    "k-differs": ("batched", lambda a: {"x": a["x"][:, :7]}, ShapeError, "x has K=7 columns"),
    "weight-transposed": (
        "batched",
        lambda a: {"weight": a["weight"].transpose(1, 2)},
        ShapeError,
        "pass weight.transpose(1, 2)",
    ),
    "weight-2d": ("batched", lambda a: {"weight": a["weight"][0]}, ShapeError, "torch.stack"),
    "no-experts": ("batched", lambda a: {"weight": a["weight"][:0]}, ShapeError, "at least one"),
    "weight-bytes": (
        "grouped",
        lambda a: {"weight": a["weight"].view(torch.uint8)},
        DTypeError,
        "say which format the bytes are",
    ),
    "weight-bf16": (
        "grouped",
        lambda a: {"weight": a["weight"].bfloat16()},
        DTypeError,
        "quantise each expert",
    ),
    "scale-shape": (
        "batched",
        lambda a: {"weight_scale": a["weight_scale"][:, :5]},
        ShapeError,
        "weight_scale for a weight [3, 8, 16] must be [3] (per-tensor)",
    ),
    "scale-of-one-expert": (
        "batched",
        lambda a: {"weight_scale": a["weight_scale"][0]},
        ShapeError,
        "weight_scale for a weight",
    ),
    "scale-block": (
        "batched",
        lambda a: {"block_size": (4, 4)},
        ShapeError,
        "needs a weight_scale [3, 2, 4]",
    ),
    "scale-negative": (
        "batched",
        lambda a: {"weight_scale": -a["weight_scale"]},
        ScaleValueError,
        "weight_scale must be finite and not negative",
    ),
    "scale-dtype": (
        "batched",
        lambda a: {"weight_scale": a["weight_scale"].double()},
        DTypeError,
        "weight_scale must be one of",
    ),
    "block-size": ("batched", lambda a: {"block_size": 128}, DTypeError, "two integers"),
    "ids-float": (
        "batched",
        lambda a: {"expert_ids": a["expert_ids"].float()},
        DTypeError,
        "expert_ids must be one of int32",
    ),
    "ids-bool": (
        "batched",
        lambda a: {"expert_ids": a["expert_ids"] > 0},
        DTypeError,
        "found bool",
    ),
    "ids-too-few": (
        "batched",
        lambda a: {"expert_ids": a["expert_ids"][:4]},
        ShapeError,
        "expert_ids must be [6], one value for each row of the output, found [4]",
    ),
    "ids-2d": (
        "batched",
        lambda a: {"expert_ids": a["expert_ids"].reshape(2, 3)},
        ShapeError,
        "found [2, 3]",
    ),
    "ids-elsewhere": (
        "batched",
        lambda a: {"expert_ids": a["expert_ids"].to("meta")},
        DeviceError,
        "expert_ids must be on the weight's device cpu, found meta",
    ),
    "offsets-too-many": (
        "grouped",
        lambda a: {"offsets": torch.zeros(4, dtype=torch.int32)},
        ShapeError,
        "offsets must be [3], one value for each expert, found [4]",
    ),
    "gather-dtype": (
        "grouped",
        lambda a: {"gather": torch.zeros(6)},
        DTypeError,
        "gather must be one of",
    ),
    "scatter-too-few": (
        "grouped",
        lambda a: {"scatter": torch.zeros(5, dtype=torch.int32)},
        ShapeError,
        "scatter must be [6], one value for each sorted row, found [5]",
    ),
    "bias-of-one-expert": (
        "batched",
        lambda a: {"bias": a["bias"][0]},
        ShapeError,
        "bias must be [3, 8], one row for each expert, found [8]",
    ),
    "bias-dtype": ("batched", lambda a: {"bias": a["bias"].int()}, DTypeError, "found int32"),
    "static-count": (
        "batched",
        lambda a: {"activation_scale": torch.ones(2)},
        ShapeError,
        "activation_scale must have one element, or one for each of 3 experts, found [2]",
    ),
    "static-zero": (
        "batched",
        lambda a: {"activation_scale": torch.zeros(3)},
        ScaleValueError,
        "activation_scale must be finite and positive",
    ),
    "out-dtype": (
        "batched",
        lambda a: {"out_dtype": torch.int8},
        DTypeError,
        "out_dtype must be one of",
    ),
    "backend-unknown": (
        "batched",
        lambda a: {"backend": "hipblaslt"},
        UnknownBackendError,
        "backend must be one of",
    ),
    "backend-without-experts": (
        "batched",
        lambda a: {"backend": "cublaslt"},
        BackendUnavailableError,
        "cublaslt needs an expert matmul, found linear layers only",
    ),
    "debug": ("grouped", lambda a: {"debug": 1}, DTypeError, "debug must be True or False"),
    "too-many-rows": (
        "batched",
        lambda a: {"gather": torch.zeros((), dtype=torch.int8).expand(MOST_ROWS + 1)},
        ShapeError,
        "at most 2146435072 rows",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_call_is_one_sentence(name: str) -> None:
    way, change, kind, said = MALFORMED[name]
    call = call_of(way)
    with pytest.raises(kind) as caught:
        call.run(**change(call.arguments))

    assert isinstance(caught.value, FP8DispatchError)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([4, 2, 6], "offsets must rise from 0, found 2 after 4 at index 1"),
        ([-1, 2, 6], "found -1 after 0 at index 0"),
        ([2, 4, 9], "offsets must not exceed the 6 sorted rows, found 9 at index 2"),
    ],
)
def test_debug_reads_the_offsets(offsets: list[int], said: str) -> None:
    call = call_of("grouped")
    wrong = torch.tensor(offsets)

    call.run(offsets=wrong)
    with pytest.raises(InvalidInputError, match=said):
        call.run(offsets=wrong, debug=True)


def test_debug_reads_the_indices() -> None:
    call = call_of("grouped")
    ends, rows = torch.tensor([2, 2, 4]), torch.arange(6)
    beyond, twice = rows.clone(), rows.clone()
    beyond[3], twice[3] = 6, 1

    call.run(offsets=ends, gather=rows, scatter=rows, debug=True)
    with pytest.raises(InvalidInputError, match="gather must hold rows from 0 to 5, found 6"):
        call.run(offsets=ends, gather=beyond, debug=True)
    with pytest.raises(InvalidInputError, match="scatter must hold rows from 0 to 5, found 6"):
        call.run(offsets=ends, scatter=beyond, debug=True)
    with pytest.raises(InvalidInputError, match=r"scatter must name each row .* found 1 more"):
        call.run(offsets=ends, scatter=twice, debug=True)
    beyond[3], beyond[5] = 3, -1  # behind the last offset nothing is used
    call.run(offsets=ends, gather=beyond, scatter=beyond, debug=True)


# Torch itself, where forward mode is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_vmap_and_forward_mode_are_refused() -> None:
    call = make_call("batched", BLOCK_128, 3, 8, 16, 6)
    x = call.arguments["x"]
    with pytest.raises(UnsupportedTransformError, match="vmap"):
        torch.func.vmap(lambda one: call.run(x=one))(torch.stack([x, x]))
    with pytest.raises(UnsupportedTransformError, match="forward-mode"), forward_ad.dual_level():
        call.run(x=forward_ad.make_dual(x, x))
