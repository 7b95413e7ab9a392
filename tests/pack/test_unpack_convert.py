"""Unpacked values are the codes times the scales; conversions change no number or are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fp8dispatch
from fp8dispatch import cli
from fp8dispatch.errors import CheckpointError, ScaleValueError
from fp8dispatch.pack import packed as packed_module
from fp8dispatch.pack.layouts.catalog import get_layout
from fp8dispatch.pack.packed import PackedCheckpoint
from fp8dispatch.pack.scheme import SCHEMES, Activations, Scheme
from tests.pack.folders import files_of, same_bytes, write_model
from tests.pack.packing import pack_tensors, quantized, random_weight, restored, write_packed

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION = "model.layers.0.self_attn"
Q, UP = f"{ATTENTION}.q_proj", "model.layers.0.mlp.up_proj"
NORM = {"model.norm.weight": torch.linspace(0.5, 1.5, 7)}
WEIGHTS = {Q: random_weight(192, 256, 1), UP: random_weight(256, 384, 2)}
ALIGNED = {Q: random_weight(128, 256, 1), UP: random_weight(256, 384, 2)}
BLOCK_WEIGHT_ONLY = replace(SCHEMES["block128"], activations=Activations.NONE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("hf", "block128"),
        ("compressed-tensors", "tensor-static"),
        ("fbgemm", "channel"),
        ("modelopt", "mxfp8"),
        ("native", "group64"),
    ],
)
def test_unpack_restores_codes_times_scale(
    layout: str, scheme: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strips that do not divide the weight, rounded once from the exact product; no more of a
    weight than a strip of whole blocks is in memory."""
    monkeypatch.setattr(packed_module, "STRIP_BYTES", 256 * 130)
    restore, largest = packed_module.restore, [0]

    def watched(module: Any, strip: torch.Tensor, *rest: Any) -> torch.Tensor:
        largest[0] = max(largest[0], strip.numel())
        return restore(module, strip, *rest)

    monkeypatch.setattr(packed_module, "restore", watched)
    source = write_packed(
        tmp_path / "packed", WEIGHTS, layout, SCHEMES[scheme], others=NORM, kv_layers=(ATTENTION,)
    )
    (source / "tokenizer.json").write_text("{}")
    done = fp8dispatch.unpack(source, tmp_path / "plain", dtype=dtype)
    assert (done.layout, done.modules, len(done.dropped)) == (layout, 2, 2)
    assert 0 < largest[0] <= 128 * 384

    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert sorted(plain) == sorted([f"{Q}.weight", f"{UP}.weight", *NORM])
    assert same_bytes(plain["model.norm.weight"], NORM["model.norm.weight"])
    for name, weight in WEIGHTS.items():
        exact = restored(*quantized(weight, SCHEMES[scheme]), SCHEMES[scheme])
        assert same_bytes(plain[f"{name}.weight"], exact.float().to(dtype))
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == {"model_type": "llama"}


def test_a_scale_may_lie_in_another_file_than_its_weight(tmp_path: Path) -> None:
    """The file that held scales alone is gone from the result and from its index; a conversion
    puts each scale beside its weight."""
    scheme = SCHEMES["block128"]
    tensors, contents = pack_tensors(ALIGNED, "hf", scheme)
    ordered = sorted({**tensors, **NORM}.items(), key=lambda item: "scale" in item[0])
    config = {"quantization_config": configuration("hf", contents)}
    source = tmp_path / "packed"
    source.mkdir()
    shards = {"model-00001-of-00002.safetensors": dict(ordered[:3])}
    shards["model-00002-of-00002.safetensors"] = dict(ordered[3:])
    for file, content in shards.items():
        save_file(content, source / file)
    weight_map = {name: file for file, content in shards.items() for name in content}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "config.json").write_text(json.dumps(config))

    fp8dispatch.unpack(source, tmp_path / "plain", dtype=torch.float32)
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00002.safetensors"}
    assert not (tmp_path / "plain" / "model-00002-of-00002.safetensors").exists()
    plain = load_file(tmp_path / "plain" / "model-00001-of-00002.safetensors")
    exact = restored(*quantized(ALIGNED[Q], scheme), scheme).float()
    assert torch.equal(plain[f"{Q}.weight"], exact)

    fp8dispatch.convert(source, tmp_path / "ct", "ct")
    index = json.loads((tmp_path / "ct" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00002.safetensors"}
    assert fp8dispatch.verify(tmp_path / "ct").ok


def configuration(layout: str, contents: Any) -> dict[str, Any]:
    """The configuration block that a format writes."""
    return get_layout(layout).config(contents)


def test_a_scale_of_zero_restores_zeros(tmp_path: Path) -> None:
    """As some packers store it for a block of zeros; another format is not given one."""
    codes = torch.zeros(128, 128).to(torch.float8_e4m3fn)
    tensors = {f"{Q}.weight": codes, f"{Q}.weight_scale_inv": torch.zeros(1, 1)}
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = write_model(tmp_path / "packed", tensors, {"quantization_config": block})
    fp8dispatch.unpack(source, tmp_path / "plain", dtype=torch.float32)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert torch.equal(plain[f"{Q}.weight"], torch.zeros(128, 128))
    assert "1 of 1 modules have scales of zero" in fp8dispatch.inspect(source).notes
    with pytest.raises(ScaleValueError, match=r"positive and finite, found 0\.0 to 0\.0"):
        fp8dispatch.convert(source, tmp_path / "ct", "ct")


@pytest.mark.parametrize("command", ["unpack", "convert"])
def test_a_job_that_was_stopped_goes_on(command: str, tmp_path: Path) -> None:
    """After the first of two files; the result is that of an undisturbed run, byte by byte."""
    tensors, contents = pack_tensors(ALIGNED, "hf", SCHEMES["block128"])
    config = {"quantization_config": configuration("hf", contents)}
    source = write_model(tmp_path / "packed", {**NORM, **tensors}, config, shards=2)
    arguments: dict[str, Any] = {} if command == "unpack" else {"layout": "native"}
    job = getattr(fp8dispatch, command)

    def stop(done: int, of: int, name: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(source, tmp_path / "stopped", progress=stop, **arguments)
    assert len(list((tmp_path / "stopped").glob("*.safetensors"))) == 1
    assert not (tmp_path / "stopped" / "config.json").exists()
    steps: list[str] = []
    job(source, tmp_path / "stopped", progress=lambda *step: steps.append(step[2]), **arguments)
    assert steps == ["model-00002-of-00002.safetensors"]
    job(source, tmp_path / "whole", **arguments)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_unpack_refuses_values_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    source = write_packed(
        tmp_path / "packed", {Q: torch.full((4, 4), 1e6)}, "compressed-tensors", SCHEMES["channel"]
    )
    with pytest.raises(CheckpointError, match=r"q_proj\.weight must fit torch.float16, found"):
        fp8dispatch.unpack(source, tmp_path / "plain", dtype=torch.float16)
    assert not (tmp_path / "plain" / "config.json").exists()
    assert not list((tmp_path / "plain").glob("*.safetensors"))


CHAINS: list[tuple[str, Scheme, tuple[str, ...]]] = [
    ("hf", SCHEMES["block128"], ("compressed-tensors", "modelopt", "native", "hf")),
    ("fbgemm", SCHEMES["channel"], ("compressed-tensors", "modelopt", "native", "fbgemm")),
    ("compressed-tensors", SCHEMES["tensor-static"], ("modelopt", "native", "compressed-tensors")),
    ("compressed-tensors", SCHEMES["mxfp8"], ("modelopt", "native", "compressed-tensors")),
    ("hf", SCHEMES["block128-ue8m0"], ("native", "hf")),
]


@pytest.mark.parametrize(("first", "scheme", "chain"), CHAINS, ids=[str(s) for _, s, _ in CHAINS])
def test_conversions_change_no_number(
    first: str, scheme: Scheme, chain: tuple[str, ...], tmp_path: Path
) -> None:
    """Through every format that holds the scheme and back, the weight file is the same to the
    byte, and the configuration too."""
    start = write_packed(tmp_path / "0", ALIGNED, first, scheme, others=NORM)
    folder = start
    for step, layout in enumerate(chain, 1):
        done = fp8dispatch.convert(folder, tmp_path / str(step), layout)
        assert (done.target, done.modules) == (layout, 2)
        folder = tmp_path / str(step)
        packed = PackedCheckpoint.open(folder)
        for name, weight in ALIGNED.items():
            module = packed.contents.modules[name]
            codes, scale = quantized(weight, scheme)
            assert torch.equal(packed.weight_scale(module), scale)
            assert same_bytes(packed.checkpoint.read(f"{name}.weight"), codes)
    ours, theirs = files_of(folder), files_of(start)
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert json.loads(ours["config.json"]) == json.loads(theirs["config.json"])
    assert sorted(ours) == sorted(theirs)


def test_conversion_widens_scales_exactly(tmp_path: Path) -> None:
    """bf16 scales, as in official files, become fp32 ones of the same value."""
    scheme = replace(SCHEMES["block128"], scale_dtype="bfloat16")
    codes, scale = quantized(ALIGNED[Q], scheme)
    tensors = {f"{Q}.weight": codes, f"{Q}.weight_scale_inv": scale.to(torch.bfloat16)}
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = write_model(tmp_path / "packed", tensors, {"quantization_config": block})
    fp8dispatch.convert(source, tmp_path / "ct", "compressed-tensors")
    found = load_file(tmp_path / "ct" / "model.safetensors")
    assert found[f"{Q}.weight_scale"].dtype == torch.float32
    assert torch.equal(found[f"{Q}.weight_scale"], scale)


def test_a_conversion_that_changes_the_activations_says_so(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "hf", ALIGNED, "hf", SCHEMES["block128"])
    done = fp8dispatch.convert(source, tmp_path / "modelopt", "modelopt")
    assert done.notes == ("activations were dynamic and are none now, as modelopt has it",)


@pytest.mark.parametrize(
    ("layout", "scheme", "target", "words"),
    [
        ("compressed-tensors", "channel", "hf", "needs another form than hf has, found: hf holds"),
        ("compressed-tensors", "tensor-static", "fbgemm", "fbgemm holds row scales with dynamic"),
        ("native", "group64", "fbgemm", "fbgemm holds row scales"),
        ("native", "block128", "modelopt", "modelopt needs whole blocks of 128x128"),
    ],
)
def test_what_would_need_other_numbers_is_refused(
    layout: str, scheme: str, target: str, words: str, tmp_path: Path
) -> None:
    source = write_packed(tmp_path / "packed", WEIGHTS, layout, SCHEMES[scheme])
    with pytest.raises(CheckpointError, match=words):
        fp8dispatch.convert(source, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_a_mixture_that_a_format_cannot_state_is_refused(tmp_path: Path) -> None:
    schemes = {Q: SCHEMES["block128"], UP: SCHEMES["block128-ue8m0"]}
    source = write_packed(tmp_path / "packed", ALIGNED, "native", schemes)
    with pytest.raises(CheckpointError, match="hf states one weight_block_size and scale_fmt"):
        fp8dispatch.convert(source, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_kv_scales_move_to_the_names_of_the_format(tmp_path: Path) -> None:
    source = write_packed(
        tmp_path / "ct",
        ALIGNED,
        "compressed-tensors",
        SCHEMES["tensor-static"],
        kv_layers=(ATTENTION,),
    )
    fp8dispatch.convert(source, tmp_path / "modelopt", "modelopt")
    found = load_file(tmp_path / "modelopt" / "model.safetensors")
    assert float(found[f"{ATTENTION}.k_proj.k_scale"]) == 0.25
    assert f"{ATTENTION}.k_scale" not in found
    exported = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())
    assert exported["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_packed(tmp_path / "hf", ALIGNED, "hf", SCHEMES["block128"])
    converted, plain = tmp_path / "ct", tmp_path / "plain"
    assert cli.main(["convert", str(source), str(converted), "--format", "ct", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "compressed-tensors"
    assert cli.main(["unpack", str(converted), str(plain), "--dtype", "fp32"]) == 0
    assert "2 weights of compressed-tensors restored to fp32" in capsys.readouterr().out
    assert cli.main(["unpack", str(plain), str(tmp_path / "again")]) == 1
    assert "this model is not quantised: pack it first" in capsys.readouterr().err
    assert cli.main(["convert", str(source), str(tmp_path / "x"), "--format", "gguf"]) == 2
    assert "format must be one of" in capsys.readouterr().err
