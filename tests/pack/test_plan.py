"""Plans: what follows from the options, every reason against, and what is done about raggedness."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8dispatch import PackOptions, plan_checkpoint
from fp8dispatch.errors import CheckpointError, InvalidInputError
from fp8dispatch.pack.calibration import Calibration
from fp8dispatch.pack.options import OnRagged, resolve
from fp8dispatch.pack.summary import PlanSummary
from tests.pack.folders import assert_one_sentence, write_model

if TYPE_CHECKING:
    from pathlib import Path

    from fp8dispatch.pack.planned import Plan


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def llama(hidden: int = 256, kv: int = 128, inner: int = 512, layers: int = 1) -> dict[str, Any]:
    """The tensors of a Llama."""
    tensors = {"model.embed_tokens.weight": bf16(330, hidden), "model.norm.weight": bf16(hidden)}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            tensors[f"{start}.{name}.weight"] = bf16(*shape)
        tensors[f"{start}.input_layernorm.weight"] = bf16(hidden)
    return tensors


CONFIG = {"model_type": "llama", "vocab_size": 330, "tie_word_embeddings": True}
K_PROJ, V_PROJ, Q_PROJ = (f"model.layers.0.self_attn.{one}_proj" for one in "kvq")


def plan_of(folder: Path, tensors: dict[str, Any] | None = None, **options: Any) -> Plan:
    calibration = options.pop("scales", None)
    source = write_model(folder, llama() if tensors is None else tensors, CONFIG)
    return plan_checkpoint(source, PackOptions(**options), calibration=calibration)


@pytest.mark.parametrize(
    ("options", "recipe", "layout", "ragged"),
    [
        ({}, "channel", "compressed-tensors", OnRagged.ERROR),
        ({"recipe": "block128"}, "block128", "hf", OnRagged.ERROR),
        ({"recipe": "group64"}, "group64", "native", OnRagged.PAD),
        ({"recipe": "mxfp8"}, "mxfp8", "compressed-tensors", OnRagged.ERROR),
        ({"layout": "ct"}, "channel", "compressed-tensors", OnRagged.ERROR),
        ({"layout": "hf"}, "block128", "hf", OnRagged.ERROR),
        ({"layout": "modelopt"}, "tensor-static", "modelopt", OnRagged.ERROR),
        ({"layout": "native"}, "block128", "native", OnRagged.PAD),
        ({"target": "vllm"}, "channel", "compressed-tensors", OnRagged.CHANNEL),
        ({"target": "transformers", "layout": "hf"}, "block128", "hf", OnRagged.SKIP),
        ({"target": "here"}, "block128", "native", OnRagged.PAD),
        ({"preset": "cpu"}, "group64", "native", OnRagged.PAD),
        ({"preset": "nvidia"}, "channel", "compressed-tensors", OnRagged.ERROR),
        ({"preset": "amd"}, "channel", "native", OnRagged.PAD),
        ({"dtype": "float8_e4m3fnuz"}, "channel", "native", OnRagged.PAD),
    ],
)
def test_what_follows_from_the_options(
    options: Any, recipe: str, layout: str, ragged: OnRagged
) -> None:
    resolved = resolve(PackOptions(**options))

    assert (resolved.recipe, resolved.layout.name, resolved.on_ragged) == (recipe, layout, ragged)


def test_names_stand_for_choices() -> None:
    assert resolve(PackOptions(on_ragged="channel")).on_ragged is OnRagged.CHANNEL


def test_the_preset_for_amd_is_fnuz() -> None:
    assert resolve(PackOptions(preset="amd")).scheme.dtype == "float8_e4m3fnuz"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "fp4"}, "recipe must be one of block128"),
        ({"layout": "gguf"}, "format must be one of"),
        ({"preset": "intel"}, "preset must be one of cpu, nvidia, amd, found 'intel'"),
        ({"target": "tpu"}, "target must be one of"),
        ({"on_ragged": "crop"}, "on_ragged must be one of skip, channel, pad, error"),
        ({"tp": 0}, "tp must be at least 1, found 0"),
        ({"dtype": "float8_e5m2"}, "two bits of mantissa and is for gradients"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_options_that_no_choice_takes(options: Any, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        resolve(PackOptions(**options))


def test_without_flags_everything_loads_everywhere(tmp_path: Path) -> None:
    planned = plan_of(tmp_path, llama(hidden=192, kv=96, inner=320))

    assert not planned.problems
    assert len(planned.weights) == 7
    assert all(planned.loads(target) for target in ("transformers", "vllm", "here"))
    reasons = {one.tensor.name: one.reason for one in planned.kept}
    assert reasons["model.embed_tokens.weight"] == "embedding"
    assert planned.bytes_after < planned.checkpoint.total_bytes


def test_a_summary_holds_every_tensor_and_round_trips(tmp_path: Path) -> None:
    planned = plan_of(tmp_path)
    summary = PlanSummary.of(planned)

    assert {row.name for row in summary.rows} == set(planned.checkpoint.tensors)
    assert PlanSummary.model_validate_json(summary.model_dump_json()) == summary
    assert [one.target for one in summary.loads] == ["transformers", "vllm", "here"]


def test_ragged_blocks_are_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    planned = plan_of(tmp_path, llama(kv=192), recipe="block128")

    assert len(planned.problems) == 2, "k_proj and v_proj; the others are whole blocks"
    with pytest.raises(CheckpointError, match="whole blocks are needed") as caught:
        planned.refuse_problems()
    assert_one_sentence(planned.problems[0], K_PROJ, "[192, 256]", "--on-ragged skip, channel")
    assert "and 1 more" in str(caught.value)


def test_ragged_blocks_skipped_take_their_fused_siblings_along(tmp_path: Path) -> None:
    planned = plan_of(tmp_path, llama(kv=192), recipe="block128", on_ragged=OnRagged.SKIP)

    assert not planned.problems and planned.loads("vllm") and planned.loads("transformers")
    assert {K_PROJ, V_PROJ, Q_PROJ}.isdisjoint(planned.weights)
    reasons = {one.module: one.reason for one in planned.kept}
    assert "no multiple of 128" in reasons[K_PROJ]
    assert reasons[Q_PROJ].endswith("which is ragged")
    assert {K_PROJ, V_PROJ, Q_PROJ} <= set(planned.contents.skipped)


def test_ragged_blocks_in_channels_keep_the_scheme_of_siblings_alike(tmp_path: Path) -> None:
    planned = plan_of(
        tmp_path,
        llama(hidden=320, inner=512),
        recipe="block128",
        layout="ct",
        on_ragged=OnRagged.CHANNEL,
    )
    schemes = {name: str(one.module.scheme) for name, one in planned.weights.items()}

    assert not planned.problems and planned.loads("vllm") and planned.loads("transformers")
    assert schemes[Q_PROJ] == schemes[K_PROJ] == "row, dynamic activations"
    assert schemes["model.layers.0.mlp.down_proj"].startswith("block 128x128")


def test_ragged_blocks_padded_are_written_and_the_plan_says_who_misreads_them(
    tmp_path: Path,
) -> None:
    planned = plan_of(tmp_path, llama(kv=192), recipe="block128", on_ragged=OnRagged.PAD)

    assert not planned.problems
    assert K_PROJ in planned.weights and not planned.loads("transformers")
    (words,) = {
        one.reason
        for one in planned.verdicts
        if one.module == K_PROJ and not one.loads and one.target == "transformers"
    }
    assert "wrong numbers without an error" in words


def test_each_rank_must_get_whole_blocks(tmp_path: Path) -> None:
    """256 rows are whole blocks, 64 on each of four ranks are not."""
    alone = plan_of(tmp_path / "1", layout="hf", target="vllm")
    split = plan_of(tmp_path / "4", layout="hf", target="vllm", tp=4)

    assert not alone.problems and len(alone.weights) == 7
    assert not split.problems and split.loads("vllm")
    assert Q_PROJ not in split.weights
    assert (
        "on each of 4 ranks"
        in {one.module: one.reason for one in split.kept}["model.layers.0.self_attn.o_proj"]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"target": "vllm", "recipe": "group64"},
            "must load in vllm, found that vLLM has no FP8",
        ),
        (
            {"target": "transformers", "layout": "modelopt", "recipe": "tensor-static"},
            "takes the c",
        ),
        ({"target": "vllm", "skip": (Q_PROJ,)}, "fuses it with .*q_proj, which is not quantised"),
        ({"recipe": "group64", "layout": "hf"}, "hf holds blocks of several rows"),
        ({"layout": "fbgemm", "recipe": "block128"}, "fbgemm holds row scales"),
        ({"skip": ("model.layers.9",)}, "'model.layers.9', which matches none; correct the name"),
        ({"only": ("nonsense",)}, "at least one weight must be quantised, found none among 10"),
        ({"recipe": "tensor-static"}, "need calibrated scales, found no calibration; run fp8disp"),
        ({"dtype": "float8_e4m3fnuz", "layout": "ct"}, "holds float8_e4m3fn weights"),
    ],
)
def test_what_stands_against_a_plan_is_one_sentence(
    tmp_path: Path, options: Any, words: str
) -> None:
    calibrated = Calibration(dict.fromkeys(modules_of(llama()), 0.1))
    if "layout" in options:
        options = {**options, "scales": calibrated}
    planned = plan_of(tmp_path, **options)

    with pytest.raises(CheckpointError, match=words):
        raise CheckpointError("\n".join(planned.problems))
    for problem in planned.problems:
        assert_one_sentence(problem)


def modules_of(tensors: dict[str, Any]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors]


def test_static_scales_are_shared_by_fused_layers_and_missing_ones_named(tmp_path: Path) -> None:
    scales = {name: 0.1 for name in modules_of(llama()) if "down" not in name}
    scales[V_PROJ] = 0.5
    planned = plan_of(tmp_path, recipe="tensor-static", scales=Calibration(scales))

    assert {planned.weights[name].activation_scale for name in (Q_PROJ, K_PROJ, V_PROJ)} == {0.5}
    (problem,) = planned.problems
    assert_one_sentence(problem, "model.layers.0.mlp.down_proj", "model.safetensors", "--skip")


def test_inputs_with_outliers_are_warned_of(tmp_path: Path) -> None:
    scales = Calibration(
        dict.fromkeys(modules_of(llama()), 0.1), saturation={Q_PROJ: 2440.0, K_PROJ: 2.0}
    )
    (warning,) = plan_of(tmp_path, recipe="tensor-static", scales=scales).warnings

    assert Q_PROJ in warning and K_PROJ not in warning


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(CheckpointError, match="must be finite and positive"):
        Calibration({"x": scale})


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "found a quantization_config in "),
        ({}, {"x.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)}, "found F8_E4M3; restore"),
        ({}, {"q.weight": bf16(64, 64), "q.weight_scale": bf16(64)}, "'q.weight_scale' is needed"),
        ({}, {"experts.gate_up_proj": bf16(4, 64, 128)}, "holds fused experts"),
        ({}, {"embed.weight": bf16(64, 64)}, "at least one weight must be quantised"),
    ],
)
def test_a_source_that_cannot_be_packed(
    tmp_path: Path, config: Any, tensors: Any, words: str
) -> None:
    folder = write_model(tmp_path, tensors or llama(), {"model_type": "llama", **config})
    planned = plan_checkpoint(folder)

    with pytest.raises(CheckpointError, match=words):
        raise CheckpointError("\n".join(planned.problems))
    for problem in planned.problems:
        assert_one_sentence(problem)


def test_a_source_that_is_quantised_by_a_file_beside_its_configuration(tmp_path: Path) -> None:
    folder = write_model(tmp_path, llama(), CONFIG)
    exported = {"quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(exported))

    assert "restore it first" in plan_checkpoint(folder).problems[0]


def test_a_source_without_configuration(tmp_path: Path) -> None:
    folder = write_model(tmp_path, llama())
    (folder / "config.json").unlink()

    assert_one_sentence(plan_checkpoint(folder).problems[0], "config.json")


def test_fused_experts_are_planned_as_one_weight_each_and_skipped_as_a_whole(
    tmp_path: Path,
) -> None:
    tensors = {
        "layers.0.experts.gate_up_proj": bf16(2, 64, 256),
        "layers.0.experts.down_proj": bf16(2, 128, 64),
        "layers.0.q.weight": bf16(128, 128),
    }
    folder = write_model(tmp_path, tensors, {"model_type": "llama4_text"})

    split = plan_checkpoint(folder)
    skipped = plan_checkpoint(folder, PackOptions(skip=("layers.0.experts.gate_up_proj",)))
    partly = plan_checkpoint(folder, PackOptions(skip=("*experts.0.*",)))

    assert not split.problems and len(split.weights) == 7
    assert split.weights["layers.0.experts.1.down_proj"].module.shape == (64, 128)
    assert "one weight for each expert" in split.warnings[0]
    assert not skipped.problems and len(skipped.weights) == 3
    assert "layers.0.experts" in skipped.contents.skipped
    assert "quantised whole or not at all" in partly.problems[0]


def test_the_files_of_a_plan_are_those_of_the_source(tmp_path: Path) -> None:
    folder = write_model(tmp_path, llama(), CONFIG, shards=3)
    planned = plan_checkpoint(folder, PackOptions(keep_master=True))
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    placed = {
        spec.name: shard.file
        for shard in planned.shards
        for spec in shard.specs
        if "/" not in shard.file
    }
    assert all(placed[name] == file for name, file in weight_map.items())
    assert all(
        placed[f"{name}.weight_scale"] == placed[f"{name}.weight"] for name in planned.weights
    )
    masters = [shard for shard in planned.shards if shard.file.startswith("master/")]
    assert sum(len(shard.specs) for shard in masters) == 7
