"""Packing: right bytes in every format and cut, whole files or none, and figures that are true."""

from __future__ import annotations

import json
import os
import random
import signal
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import fp8dispatch
from fp8dispatch import PackOptions, pack_checkpoint, plan_checkpoint
from fp8dispatch.errors import CheckpointError, InvalidInputError, NumericalOverflowError
from fp8dispatch.formats import decode_scale
from fp8dispatch.pack import output as output_module
from fp8dispatch.pack import packing, rawio, writer
from fp8dispatch.pack.calibration import Calibration
from fp8dispatch.pack.layouts.catalog import LAYOUTS
from fp8dispatch.pack.options import OnRagged
from fp8dispatch.pack.report import Report
from fp8dispatch.pack.scheme import SCHEMES
from tests.pack.folders import assert_one_sentence, files_of, same_bytes, write_model
from tests.pack.test_checkpoint import hub_cache
from tests.pack.test_plan import CONFIG, Q_PROJ, llama, modules_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = llama(layers=2)
SCALES = Calibration(
    {name: 0.01 * (number + 1) for number, name in enumerate(modules_of(MODEL))},
    amax_history={Q_PROJ: (3.5, 2.0)},
    saturation={Q_PROJ: 99.0},
)
SCALE_NAMES = {
    "compressed-tensors": "weight_scale",
    "hf": "weight_scale_inv",
    "modelopt": "weight_scale",
    "fbgemm": "weight_scale",
    "native": "weight_scale",
}
FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
COMBINATIONS = [
    *(("native", recipe) for recipe in SCHEMES),
    *(
        ("compressed-tensors", recipe)
        for recipe in ("channel", "tensor-static", "block128", "mxfp8")
    ),
    *(("hf", recipe) for recipe in ("block128", "block128-ue8m0")),
    *(("modelopt", recipe) for recipe in ("tensor-static", "channel", "mxfp8")),
    ("fbgemm", "channel"),
]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, as safetensors' own reader sees it."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(("layout", "recipe"), COMBINATIONS)
def test_the_bytes_are_those_of_quantize(tmp_path: Path, layout: str, recipe: str) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG, shards=2)
    scheme = SCHEMES[recipe]

    done = pack_checkpoint(
        source,
        tmp_path / "out",
        PackOptions(recipe=recipe, layout=layout),
        calibration=SCALES,
        report=False,
    )

    packed = loaded(tmp_path / "out")
    assert len(done.plan.weights) == 14
    for name, tensor in MODEL.items():
        module = name.removesuffix(".weight")
        if module not in done.plan.weights:
            assert same_bytes(packed.pop(name), tensor), name
            continue
        data, scale = fp8dispatch.quantize(
            tensor, scheme.recipe, scale_dtype=getattr(torch, scheme.scale_dtype)
        )
        assert same_bytes(packed.pop(name), data), name
        stored = packed.pop(f"{module}.{SCALE_NAMES[layout]}")
        assert same_bytes(stored.reshape(-1), scale.reshape(-1)), name
        if layout == "native":
            reciprocal = packed.pop(f"{module}.weight_scale_reciprocal")
            assert torch.equal(reciprocal, 1 / decode_scale(scale))
        if recipe == "tensor-static":
            key = "activation_scale" if layout == "native" else "input_scale"
            assert float(packed.pop(f"{module}.{key}")) > 0
    assert not packed, "nothing else is written"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_configuration_comes_with_the_models_own(tmp_path: Path, layout: str) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    done = pack_checkpoint(
        source, tmp_path / "out", PackOptions(layout=layout), calibration=SCALES, report=False
    )

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert config["quantization_config"] == done.plan.resolved.layout.config(done.plan.contents)


def test_fnuz_export_has_no_nan_byte(tmp_path: Path) -> None:
    """In FNUZ the byte 0x80, which is minus zero elsewhere, is NaN."""
    tensors = {"a.weight": torch.randn(128, 128) * 1e-3}
    tensors["a.weight"][0] = -0.0
    tensors["a.weight"][1] = -1e-30
    source = write_model(tmp_path / "in", tensors)

    pack_checkpoint(source, tmp_path / "out", PackOptions(preset="amd"), report=False)

    weight = loaded(tmp_path / "out")["a.weight"]
    assert weight.dtype == torch.float8_e4m3fnuz
    assert not (weight.view(torch.uint8) == 0x80).any()
    assert float(weight.float().abs().max()) == 240


@pytest.mark.parametrize("options", [{"recipe": "block128"}, {"recipe": "tensor-static"}, {}])
def test_workers_and_units_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG, shards=2)
    before = torch.get_num_threads()
    for workers, unit in ((1, 1 << 24), (3, 1), (2, 100_000)):
        monkeypatch.setattr(packing, "UNIT_BYTES", unit)
        out = tmp_path / str(workers)
        pack_checkpoint(source, out, PackOptions(**options), calibration=SCALES, workers=workers)

    assert files_of(tmp_path / "1") == files_of(tmp_path / "2") == files_of(tmp_path / "3")
    assert torch.get_num_threads() == before


def test_fused_experts_become_one_weight_each(tmp_path: Path) -> None:
    gate_up, down = torch.randn(2, 192, 256), torch.randn(2, 128, 192)
    tensors = {"l.experts.gate_up_proj": gate_up, "l.experts.down_proj": down}
    source = write_model(tmp_path / "in", tensors, {"model_type": "llama4"})

    pack_checkpoint(source, tmp_path / "out", PackOptions(preset="cpu", keep_master=True))

    packed = loaded(tmp_path / "out")
    for expert in range(2):
        for name, matrix in (
            ("gate_proj", gate_up[expert, :, :128].t()),
            ("up_proj", gate_up[expert, :, 128:].t()),
            ("down_proj", down[expert].t()),
        ):
            data, _ = fp8dispatch.quantize(matrix.contiguous(), "block", block_size=(1, 64))
            assert same_bytes(packed[f"l.experts.{expert}.{name}.weight"], data)
    masters = load_file(tmp_path / "out" / "master" / "model.safetensors")
    assert same_bytes(masters["l.experts.gate_up_proj"], gate_up)


def test_what_belongs_to_the_model_is_copied_and_the_source_untouched(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_bytes(b"x")
    before = files_of(source)

    pack_checkpoint(source, tmp_path / "out", report=False)

    assert files_of(source) == before
    assert {*files_of(tmp_path / "out")} == {*before} - {"pytorch_model.bin"}


def test_a_hub_cache_is_packed(tmp_path: Path) -> None:
    model = hub_cache(tmp_path, {"x.weight": torch.randn(64, 64), "y.weight": torch.randn(64, 64)})

    pack_checkpoint(model, tmp_path / "out", report=False)

    assert loaded(tmp_path / "out")["x.weight"].dtype == torch.float8_e4m3fn


def test_the_report_is_of_every_weight(tmp_path: Path) -> None:
    tensors = {**MODEL, "spoilt.weight": torch.full((128, 128), 1e-9)}
    tensors["spoilt.weight"][0, 0] = 1000.0
    source = write_model(tmp_path / "in", tensors, CONFIG)

    done = pack_checkpoint(
        source, tmp_path / "out", PackOptions(recipe="block128"), calibration=SCALES
    )

    report = Report.model_validate_json((tmp_path / "out" / "fp8_report.json").read_text())
    assert report == done.report
    assert [one.name for one in report.tensors] == [f"{name}.weight" for name in done.plan.weights]
    assert report.totals.bytes_after == sum(t.nbytes for t in loaded(tmp_path / "out").values())
    figures = {one.name: one for one in report.tensors}
    assert figures.pop("spoilt.weight").flushed > 0.99
    assert all(31 < (one.sqnr_db or 99) < 32.5 for one in figures.values())
    assert figures[report.worst[0]].sqnr_db == min(one.sqnr_db or 99 for one in figures.values())
    assert report.activation_saturation == {Q_PROJ: 99.0}
    page = (tmp_path / "out" / "fp8_report.md").read_text()
    assert "lowest SQNR" in page and Q_PROJ in page
    assert (tmp_path / "out" / "fp8_report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_elsewhere_and_none(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    done = pack_checkpoint(source, tmp_path / "a", report=tmp_path / "r" / "mine.json")
    none = pack_checkpoint(source, tmp_path / "b", report=False)

    assert [path.name for path in done.report_files] == ["mine.json", "mine.md", "mine.png"]
    assert all(path.is_file() for path in done.report_files)
    assert none.report is None and not list(tmp_path.glob("[ab]/*report*"))


def test_without_matplotlib_the_picture_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8dispatch.pack.report.find_spec", lambda name: None)
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    done = pack_checkpoint(source, tmp_path / "out")

    assert (
        "needs matplotlib, found none installed; pip install 'fp8dispatch[plot]'" in done.notes[0]
    )
    assert not (tmp_path / "out" / "fp8_report.png").exists()


@pytest.mark.parametrize("recipe", ["block128", "tensor-static", "channel"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_before_its_file_is_there(
    tmp_path: Path, recipe: str, value: float
) -> None:
    tensors = {**MODEL, "bad.weight": torch.randn(128, 128)}
    tensors["bad.weight"][100, 100] = value
    source = write_model(tmp_path / "in", tensors, CONFIG)

    with pytest.raises(NumericalOverflowError) as caught:
        pack_checkpoint(
            source,
            tmp_path / "out",
            PackOptions(recipe=recipe, layout="native"),
            calibration=Calibration({**SCALES.activation_scales, "bad": 0.1}),
        )

    assert_one_sentence(str(caught.value), source / "model.safetensors", "'bad.weight'", "--skip")
    assert not [name for name in files_of(tmp_path / "out") if name.endswith("safetensors")]
    done = pack_checkpoint(source, tmp_path / "out", PackOptions(skip=("bad",)), force=True)
    assert done.report is not None


def test_a_source_that_shrinks_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)
    planned = plan_checkpoint(source)
    os.truncate(source / "model.safetensors", 70_000)

    with pytest.raises(CheckpointError, match="the file was changed while it was read"):
        packing.carry_out(planned, tmp_path / "out")


def test_workers_below_one_are_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    with pytest.raises(InvalidInputError, match="workers must be at least 1, found 0"):
        pack_checkpoint(source, tmp_path / "out", workers=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A source of four files, and what packing it without a kill gives."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_model(folder / "in", llama(layers=2), CONFIG, shards=4)
    pack_checkpoint(source, folder / "out", PackOptions(recipe="block128", keep_master=True))
    yield source, files_of(folder / "out")


def killed(source: Path, out: Path, event: int) -> bool:
    """Pack in a child that kills itself at its n-th write or rename; whether it came to that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside torch's threads
        child = os.fork()
    if child == 0:
        left = [event]

        def counted(function: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        writer.write_at = counted(rawio.write_at)
        rawio.publish = output_module.publish = counted(rawio.publish)
        pack_checkpoint(source, out, PackOptions(recipe="block128", keep_master=True), workers=2)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@FORK
@pytest.mark.parametrize("seed", range(6))
def test_a_kill_at_any_point_and_a_resume_give_the_same_bytes(
    tmp_path: Path, whole: tuple[Path, dict[str, bytes]], seed: int
) -> None:
    """About 130 writes and renames; the first kill is at any of them, the others soon after."""
    source, expected = whole
    out = tmp_path / "out"
    generator = random.Random(seed)
    kills = [generator.randrange(1, 130), generator.randrange(1, 20), generator.randrange(1, 20)]
    for event in kills:
        if not killed(source, out, event):
            break
        for name, content in files_of(out).items():
            if not name.startswith(".fp8dispatch/"):
                assert content == expected[name], "what has a final name is complete"

    done = (
        pack_checkpoint(source, out, PackOptions(recipe="block128", keep_master=True), force=False)
        if (out / ".fp8dispatch").exists()
        else None
    )
    assert done is None or done.resumed or kills[0] < 3
    assert files_of(out) == expected


@FORK
def test_other_options_do_not_resume(tmp_path: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    source, _ = whole
    assert killed(source, tmp_path / "out", 60)
    same = PackOptions(recipe="block128", keep_master=True)

    for other in (
        replace(same, recipe="block128-ue8m0"),
        replace(same, layout="native"),
        replace(same, skip=(Q_PROJ,)),
        replace(same, keep_master=False),
    ):
        with pytest.raises(CheckpointError, match="must be resumed with the same source and opt"):
            pack_checkpoint(source, tmp_path / "out", other)
    with pytest.raises(CheckpointError, match="must be resumed with the same source and options"):
        pack_checkpoint(source, tmp_path / "out", same, report=False)


def seldom(draw: Any, strange: Any, usual: Any) -> Any:
    """The usual most of the time, so that many plans succeed."""
    return draw(strange) if draw(st.integers(0, 7)) == 0 else draw(usual)


def any_tensors(draw: Any) -> dict[str, torch.Tensor]:
    """Tensors with the names of linear layers and others, in likely and odd shapes."""
    names = ["k_proj", "mlp.up_proj", "mlp.gate", "lm_head", "experts.0.w1", "experts"]
    more = st.lists(st.sampled_from(names), max_size=3, unique=True)
    floats = [torch.bfloat16, torch.float16, torch.float32]
    tensors = {}
    for name in ["q_proj", *draw(more)]:
        rank = seldom(draw, st.integers(1, 3), st.just(2))
        sizes = [64, 96, 128, 192, 256]
        shape = [seldom(draw, st.integers(1, 70), st.sampled_from(sizes)) for _ in range(rank)]
        others = st.sampled_from([torch.float64, torch.int32, torch.float8_e4m3fn])
        dtype = seldom(draw, others, st.sampled_from(floats))
        tensors[f"{name}.weight"] = torch.ones(shape).to(dtype)
    if draw(st.integers(0, 9)) == 0:
        tensors["q_proj.weight_scale"] = torch.ones(1)
    return tensors


def any_options(draw: Any) -> PackOptions:
    """Options that go together most of the time."""
    layout, recipe = seldom(
        draw,
        st.tuples(st.sampled_from([None, *LAYOUTS]), st.sampled_from([None, *SCHEMES])),
        st.sampled_from(COMBINATIONS),
    )
    return PackOptions(
        recipe=recipe,
        layout=layout,
        dtype=seldom(draw, st.just("float8_e4m3fnuz"), st.none()),
        target=seldom(draw, st.sampled_from(["vllm", "transformers", "here"]), st.none()),
        tp=draw(st.sampled_from([1, 2])),
        on_ragged=draw(st.sampled_from([None, *OnRagged])),
        skip=seldom(draw, st.just(("q_proj",)), st.just(())),
        keep_master=draw(st.booleans()),
    )


@given(st.data())
def test_a_plan_predicts_every_failure(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever the shapes, dtypes and options: without problems packing succeeds, else it raises
    the first of them and writes nothing; and the sizes are those of the plan."""
    tensors, options = any_tensors(data.draw), any_options(data.draw)
    folder = tmp_path_factory.mktemp("plan")
    source = write_model(folder / "in", tensors, {"model_type": "llama"})
    complete = Calibration(dict.fromkeys(modules_of(tensors), 0.5))
    scales = seldom(data.draw, st.sampled_from([None, SCALES]), st.just(complete))
    planned = plan_checkpoint(source, options, calibration=scales)

    if planned.problems:
        with pytest.raises(CheckpointError) as caught:
            packing.carry_out(planned, folder / "out", workers=1)
        assert str(caught.value).startswith(planned.problems[0])
        assert not (folder / "out").exists()
        return
    packing.carry_out(planned, folder / "out", workers=1, report=False)
    for shard in planned.shards:
        assert (folder / "out" / shard.file).stat().st_size == shard.nbytes
    for tensor in loaded(folder / "out").values():
        assert not torch.isnan(tensor.float()).any()


def test_a_scheme_of_another_dtype_reaches_the_file(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)
    options = PackOptions(recipe="group32", dtype="float8_e4m3fnuz")

    done = pack_checkpoint(source, tmp_path / "out", options, report=False)

    scheme = replace(SCHEMES["group32"], dtype="float8_e4m3fnuz")
    assert {one.module.scheme for one in done.plan.weights.values()} == {scheme}


ATTENTION = [f"model.layers.{layer}.self_attn" for layer in range(2)]
KV = Calibration({}, kv_scales=dict.fromkeys(ATTENTION, ((0.5, 0.25), (1.0, 2.0))))


@pytest.mark.parametrize(
    ("layout", "choice", "key", "keys", "values"),
    [
        ("compressed-tensors", "layer", "k_scale", [0.5], [2.0]),
        ("compressed-tensors", "head", "k_scale", [0.5, 0.25], [1.0, 2.0]),
        ("native", "head", "k_scale", [0.5, 0.25], [1.0, 2.0]),
    ],
)
def test_scales_of_the_kv_cache_are_written_beside_their_layer(
    tmp_path: Path, layout: str, choice: str, key: str, keys: list[float], values: list[float]
) -> None:
    source = write_model(tmp_path / "in", MODEL, CONFIG)

    done = pack_checkpoint(
        source,
        tmp_path / "out",
        PackOptions(recipe="channel", layout=layout, kv_scales=choice),
        calibration=KV,
        report=False,
    )

    packed = loaded(tmp_path / "out")
    for layer in ATTENTION:
        assert packed[f"{layer}.{key}"].flatten().tolist() == keys
        assert packed[f"{layer}.v_scale"].flatten().tolist() == values
    assert done.plan.contents.kv is not None
    assert fp8dispatch.inspect(tmp_path / "out") is not None


@pytest.mark.parametrize(
    ("calibration", "layout", "choice", "words"),
    [
        (None, "ct", "layer", "need a calibration that measured it, found none"),
        (SCALES, "ct", "layer", "need a calibration that measured it, found none"),
        (KV, "modelopt", "head", "one KV scale per layer"),
        (
            Calibration({}, kv_scales={"a": ((1.0,), (1.0,)), "b": ((1.0, 2.0), (1.0,))}),
            "ct",
            "head",
            r"equally many KV heads in all layers, found \[1, 2\]",
        ),
        (
            Calibration({}, kv_scales={"other.attn": ((1.0,), (1.0,))}),
            "ct",
            "layer",
            "'other.attn' must have tensors in the source",
        ),
    ],
)
def test_scales_of_the_kv_cache_that_cannot_be_written(
    tmp_path: Path, calibration: Calibration | None, layout: str, choice: str, words: str
) -> None:
    source = write_model(tmp_path, MODEL, CONFIG)
    options = PackOptions(recipe="channel", layout=layout, kv_scales=choice)

    with pytest.raises(CheckpointError, match=words):
        plan_checkpoint(source, options, calibration=calibration).refuse_problems()
