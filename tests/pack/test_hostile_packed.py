"""Packed checkpoints that lie: each is refused in one sentence before anything is written.

Every case names the file or folder and the tensor or key, the rule, what was found and the remedy.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fp8dispatch
from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.scheme import SCHEMES
from tests.pack.folders import assert_one_sentence
from tests.pack.packing import random_weight, write_packed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

X = "layers.0.q_proj"
W, S, INV, IN = f"{X}.weight", f"{X}.weight_scale", f"{X}.weight_scale_inv", f"{X}.input_scale"
FILE = "model.safetensors"

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def tensors_case(layout: str, scheme: str, edit: Callable[[Tensors], Any], *names: str) -> Any:
    return (layout, scheme, edit, None, names)


def config_case(layout: str, scheme: str, edit: Callable[[Config], Any], *names: str) -> Any:
    return (layout, scheme, None, edit, names)


def group(config: Config) -> Config:
    found: Config = config["quantization_config"]["config_groups"]["group_0"]
    return found


def block(config: Config) -> Config:
    found: Config = config["quantization_config"]
    return found


CASES: dict[str, Any] = {
    "a missing scale": tensors_case("ct", "channel", lambda t: t.pop(S), FILE, W, "weight scale"),
    "two scales": tensors_case(
        "ct", "channel", lambda t: t.update({INV: t[S].clone()}), FILE, W, INV, S
    ),
    "a scale of integers": tensors_case(
        "ct", "channel", lambda t: t.update({S: t[S].long()}), FILE, S, "I64"
    ),
    "a scale in FP8": tensors_case(
        "ct", "channel", lambda t: t.update({S: t[S].to(torch.float8_e4m3fn)}), FILE, S, "F8_E4M3"
    ),
    "a scale without its weight": tensors_case(
        "ct", "channel", lambda t: t.pop(W), FILE, S, W, "in any file"
    ),
    "codes cast to bf16": tensors_case(
        "ct", "channel", lambda t: t.update({W: t[W].bfloat16()}), FILE, W, S, "BF16"
    ),
    "codes as bytes": tensors_case(
        "ct", "channel", lambda t: t.update({W: t[W].view(torch.uint8)}), FILE, W, S, "U8"
    ),
    "too few scales": tensors_case(
        "ct", "channel", lambda t: t.update({S: t[S][1:]}), S, "[127, 1]", "channel"
    ),
    "a transposed grid": tensors_case(
        "hf", "block128", lambda t: t.update({INV: t[INV].t().contiguous()}), INV, "[2, 1]"
    ),
    "a scale for the tensor where blocks are said": tensors_case(
        "hf", "block128", lambda t: t.update({INV: torch.ones(1)}), INV, "[1]", "[128, 128]"
    ),
    "a stack of experts": tensors_case(
        "ct", "channel", lambda t: t.update({W: t[W][None]}), FILE, W, "[1, 128, 256]"
    ),
    "codes under another name": tensors_case(
        "ct", "channel", lambda t: t.update({"experts": t[W].clone()}), FILE, "experts", "X.weight"
    ),
    "an empty weight": tensors_case(
        "ct", "channel", lambda t: t.update({W: t[W][:0]}), FILE, W, "[0, 256]"
    ),
    "a scale of NaN": tensors_case(
        "ct", "channel", lambda t: t[S].__setitem__(3, math.nan), FILE, S, "nan"
    ),
    "a scale of infinity": tensors_case(
        "ct", "channel", lambda t: t[S].__setitem__(3, math.inf), FILE, S, "inf"
    ),
    "a negative scale": tensors_case(
        "ct", "channel", lambda t: t[S].__setitem__(3, -0.5), FILE, S, "-0.5"
    ),
    "an exponent that means NaN": tensors_case(
        "modelopt", "mxfp8", lambda t: t[S].__setitem__((3, 1), 255), FILE, S, "nan"
    ),
    "a code that means NaN": tensors_case(
        "ct", "channel", lambda t: t[W].view(torch.uint8)[9].fill_(0xFF), FILE, W, "256 that mean"
    ),
    "a static scale beside blocks": tensors_case(
        "hf", "block128", lambda t: t.update({IN: torch.ones(1)}), X, "static", "dynamic"
    ),
    "a missing activation scale": tensors_case(
        "ct", "tensor-static", lambda t: t.pop(IN), X, "input_scale", "group_0"
    ),
    "KV scales of integers": tensors_case(
        "ct",
        "channel",
        lambda t: t.update({"layers.0.self_attn.k_scale": torch.ones(1, dtype=torch.int8)}),
        FILE,
        "layers.0.self_attn.k_scale",
        "I8",
    ),
    "KV scales for some heads": tensors_case(
        "ct",
        "channel",
        lambda t: t.update({"a.k_scale": torch.ones(4), "a.v_scale": torch.ones(2)}),
        "[2, 4]",
        "KV cache",
    ),
    "no configuration of the quantisation": config_case(
        "ct", "channel", lambda c: c.pop("quantization_config"), "config.json", "pack it first"
    ),
    "a list for a configuration": config_case(
        "ct", "channel", lambda c: c.update(quantization_config=[1]), "config.json", "list"
    ),
    "an unknown method": config_case(
        "ct", "channel", lambda c: block(c).update(quant_method="awq"), "quant_method", "awq"
    ),
    "a method that is no name": config_case(
        "ct", "channel", lambda c: block(c).update(quant_method={"a": 1}), "quant_method"
    ),
    "no groups": config_case(
        "ct", "channel", lambda c: block(c).update(config_groups={}), "config_groups", "{}"
    ),
    "a group that is no object": config_case(
        "ct", "channel", lambda c: block(c)["config_groups"].update(group_0=3), "group_0", "targets"
    ),
    "targets that miss the layer": config_case(
        "ct", "channel", lambda c: group(c).update(targets=["layers.9.x"]), W, "config_groups"
    ),
    "a target that is no pattern": config_case(
        "ct", "channel", lambda c: group(c).update(targets=["re:["]), "'['", "expression"
    ),
    "four bits": config_case(
        "ct", "channel", lambda c: group(c)["weights"].update(num_bits=4), W, "group_0", "8-bit"
    ),
    "an unknown strategy": config_case(
        "ct", "channel", lambda c: group(c)["weights"].update(strategy="moon"), "group_0", "moon"
    ),
    "groups of none": config_case(
        "ct",
        "channel",
        lambda c: group(c)["weights"].update(strategy="group", group_size=0),
        "group_0",
        "positive",
    ),
    "blocks of text": config_case(
        "hf", "block128", lambda c: block(c).update(weight_block_size="128"), "weight_block_size"
    ),
    "negative blocks": config_case(
        "hf",
        "block128",
        lambda c: block(c).update(weight_block_size=[-128, 128]),
        "weight_block_size",
        "-128",
    ),
    "an algorithm of four bits": config_case(
        "modelopt", "mxfp8", lambda c: block(c).update(quant_algo="NVFP4"), "quant_algo", "NVFP4"
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    layout, scheme, edit_tensors, edit_config, names = CASES[case]
    folder = write_packed(
        tmp_path / "packed", {X: random_weight(128, 256)}, layout, SCHEMES[scheme]
    )
    if edit_tensors is not None:
        tensors = load_file(folder / FILE)
        edit_tensors(tensors)
        save_file(tensors, folder / FILE)
    if edit_config is not None:
        config = json.loads((folder / "config.json").read_text())
        edit_config(config)
        (folder / "config.json").write_text(json.dumps(config))
    refused(folder, tmp_path / "out", *names)


def refused(folder: Path, out: Path, *names: str) -> None:
    """Unpacking raises one sentence with these names in it and leaves no file under a final name;
    loading raises too."""
    with pytest.raises(CheckpointError) as caught:
        fp8dispatch.unpack(folder, out)
    assert_one_sentence(str(caught.value), folder, *names)
    assert not out.exists() or not [*out.glob("*.safetensors"), *out.glob("*.json")]
    with pytest.raises(CheckpointError):
        fp8dispatch.load(folder, model=torch.nn.Module())


def metadata(content: Config) -> Config:
    found: Config = content["modules"][X]
    return found


NATIVE: dict[str, tuple[Callable[[Config], Any], tuple[str, ...]]] = {
    "another version": (lambda m: m.update(version=2), ("version 1", "found 2")),
    "no modules": (lambda m: m.update(modules=[]), (X,)),
    "a module less": (lambda m: m["modules"].clear(), (X,)),
    "an unknown key": (lambda m: metadata(m).update(colour="red"), (X, "colour")),
    "a format of the codes that is another": (
        lambda m: metadata(m).update(format="E5M2"),
        (W, "F8_E5M2", "F8_E4M3"),
    ),
    "a group size of none": (lambda m: metadata(m).update(group_size=0), (X, "group_size")),
    "a group size that does not fit": (lambda m: metadata(m).update(group_size=32), (S,)),
    "activations without their scale": (
        lambda m: metadata(m).update(activations="static"),
        (X, "static", "dynamic"),
    ),
}


@pytest.mark.parametrize("case", NATIVE)
def test_metadata_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    folder = write_packed(
        tmp_path / "packed", {X: random_weight(128, 256)}, "native", SCHEMES["group64"]
    )
    edit, names = NATIVE[case]
    content = json.loads((folder / "fp8dispatch.json").read_text())
    edit(content)
    (folder / "fp8dispatch.json").write_text(json.dumps(content))
    refused(folder, tmp_path / "out", "fp8dispatch.json", *names)


def test_metadata_that_is_missing_huge_or_no_json(tmp_path: Path) -> None:
    folder = write_packed(
        tmp_path / "packed", {X: random_weight(128, 256)}, "native", SCHEMES["group64"]
    )
    path = folder / "fp8dispatch.json"
    path.write_bytes(b'{"modules": ' + b"[" * 200_000)
    refused(folder, tmp_path / "1", "fp8dispatch.json")
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)  # no more than its limit is ever read
    refused(folder, tmp_path / "2", "fp8dispatch.json", "at most")
    path.unlink()
    refused(folder, tmp_path / "3", "fp8dispatch.json")


def test_an_export_of_modelopt_without_its_object(tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "p", {X: random_weight(32, 32)}, "modelopt", SCHEMES["mxfp8"])
    (folder / "config.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text('{"quantization": "FP8"}')
    refused(folder, tmp_path / "out", "hf_quant_config.json", "found str")


def test_an_activation_scale_of_zero_is_refused_when_loaded(tmp_path: Path) -> None:
    """Unpacking has no use for it; running would divide by it."""
    folder = write_packed(
        tmp_path / "p", {X: random_weight(32, 32)}, "ct", SCHEMES["tensor-static"]
    )
    tensors = load_file(folder / FILE)
    tensors[IN].zero_()
    save_file(tensors, folder / FILE)
    model = torch.nn.ModuleDict(
        {
            "layers": torch.nn.ModuleList(
                [torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 32, False)})]
            )
        }
    )
    with pytest.raises(CheckpointError) as caught:
        fp8dispatch.load(folder, model=model)
    assert_one_sentence(str(caught.value), FILE, IN, "found 0.0 in 1 of 1 places")
    assert not fp8dispatch.verify(folder).ok
