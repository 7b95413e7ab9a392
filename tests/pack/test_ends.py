"""`keep_ends`: which layers are the first and last of a model, and that they stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fp8dispatch import InvalidInputError, PackOptions, plan_checkpoint
from fp8dispatch.pack.ends import EndLayers
from fp8dispatch.pack.summary import PlanSummary
from tests.pack.folders import assert_one_sentence, write_model
from tests.pack.test_plan import CONFIG, bf16, llama, modules_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("names", "config", "count", "kept"),
    [
        ([f"model.layers.{n}.mlp.up_proj.weight" for n in range(30)], {}, 2, {0, 1, 28, 29}),
        ([f"transformer.h.{n}.attn.c_attn.weight" for n in range(12)], None, 1, {0, 11}),
        ([f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)], {}, 3, {0, 1, 2, 3}),
        ([f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)], {}, 0, set()),
        # The layer behind the last predicts more tokens, and is no end of the stack.
        (
            [f"model.layers.{n}.mlp.up_proj.weight" for n in range(6)],
            {"num_hidden_layers": 5},
            1,
            {0, 4},
        ),
        (
            [f"model.language_model.layers.{n}.mlp.up_proj.weight" for n in range(6)],
            {"text_config": {"num_hidden_layers": 5}, "num_hidden_layers": 99},
            1,
            {0, 4},
        ),
    ],
)
def test_the_ends_of_a_stack(
    names: list[str], config: dict[str, Any] | None, count: int, kept: set[int]
) -> None:
    ends = EndLayers([*names, "model.norm.weight"], config, count)

    found = {n for n, name in enumerate(names) if ends.holds(name.removesuffix(".weight"))}

    assert found == kept
    assert not ends.holds("lm_head") and not ends.holds("other.layers.0.up")


def test_an_encoder_and_a_decoder_have_ends_of_their_own() -> None:
    names = [f"encoder.block.{n}.layer.1.DenseReluDense.wi.weight" for n in range(3)]
    names += [f"decoder.block.{n}.layer.2.DenseReluDense.wi.weight" for n in range(5)]

    ends = EndLayers(names, {"num_hidden_layers": 2}, 1)

    assert ends.stacks == {"encoder.block": 3, "decoder.block": 5}
    assert ends.holds("encoder.block.2.layer.0") and not ends.holds("decoder.block.2.layer.0")


def test_experts_count_by_their_layer_not_their_number() -> None:
    names = [f"model.layers.{n}.mlp.experts.{e}.w1.weight" for n in range(3) for e in range(9)]

    ends = EndLayers(names, {}, 1)

    assert ends.holds("model.layers.2.mlp.experts.4.w1")
    assert not ends.holds("model.layers.1.mlp.experts.0.w1")


def test_they_stay_and_the_plan_says_why(tmp_path: Path) -> None:
    model = llama(layers=4)
    source = write_model(tmp_path / "in", model, CONFIG)

    planned = plan_checkpoint(source, PackOptions(keep_ends=1))

    names = [name for name in modules_of(model) if "_proj" in name]
    middle = {name for name in names if ".layers.1." in name or ".layers.2." in name}
    assert not planned.problems
    assert set(planned.weights) == middle
    reasons = {row.name: row.reason for row in PlanSummary.of(planned).rows}
    assert reasons["model.layers.3.mlp.up_proj.weight"] == "--keep-ends 1"
    ignored = planned.resolved.layout.config(planned.contents)["ignore"]
    assert "model.layers.0.mlp.up_proj" in ignored


def test_a_model_without_numbered_layers_and_a_negative_number(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", {"x.weight": bf16(128, 128)}, CONFIG)

    (problem,) = plan_checkpoint(source, PackOptions(keep_ends=1)).problems

    assert_one_sentence(problem, source, "--keep-ends", "--skip")
    with pytest.raises(InvalidInputError, match="keep_ends must be 0 or more, found -1"):
        plan_checkpoint(source, PackOptions(keep_ends=-1))
