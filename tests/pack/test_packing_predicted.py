"""A plan predicts every failure of packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch import PackOptions, plan_checkpoint
from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack import packing
from fp8dispatch.pack.calibration import Calibration
from fp8dispatch.pack.layouts.catalog import LAYOUTS
from fp8dispatch.pack.options import OnRagged
from fp8dispatch.pack.scheme import SCHEMES
from tests.pack.folders import write_model
from tests.pack.test_packing import COMBINATIONS, SCALES, loaded
from tests.pack.test_plan import modules_of

SEARCHED = ("channel", "block128", "group32", "group64", "group128")


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
        scales=draw(st.sampled_from(["amax", "mse"])) if recipe in SEARCHED else "amax",
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
