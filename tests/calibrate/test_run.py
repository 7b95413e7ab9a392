"""``fp8dispatch calibrate``: a checkpoint and a text in, statistics out, in one run or several."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fp8dispatch.calibrate import checkpoint as checkpoint_module
from fp8dispatch.calibrate import command
from fp8dispatch.calibrate import run as run_module
from fp8dispatch.calibrate.checkpoint import load_checkpoint
from fp8dispatch.calibrate.observe import Calibrator
from fp8dispatch.calibrate.run import Plan, run_plan
from fp8dispatch.calibrate.stats import CalibrationStats
from fp8dispatch.errors import CalibrationError
from tests.calibrate.conftest import LINES, main
from tests.calibrate.models import llama, mixtral, save_checkpoint

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


def plan(folder: Path, text: Path, output: Path, **changes: Any) -> Plan:
    return Plan(**{"model": folder, "text": text, "output": output, "samples": 40, **changes})


def stop_at(samples: int) -> Callable[[int, int, int], None]:
    def on_progress(done: int, of: int, tokens: int) -> None:
        if done == samples:
            raise KeyboardInterrupt

    return on_progress


def test_the_statistics_are_those_of_the_models_own_calls(
    folder: Path, text: Path, output: Path
) -> None:
    result = run_plan(plan(folder, text, output, samples=5))

    loaded = load_checkpoint(folder, "auto", torch.device("cpu"))
    with torch.no_grad(), Calibrator(loaded.model) as calibrator:
        for line in LINES[:5]:
            loaded.model(torch.tensor([[ord(letter) for letter in line[:64]]]))
    expected = calibrator.stats()
    assert result.stats.modules == expected.modules
    assert result.stats.kv_cache == expected.kv_cache
    assert CalibrationStats.load(output) == result.stats
    assert (result.stats.samples, result.samples) == (5, 5)
    assert result.stats.tokens == sum(min(len(line), 64) for line in LINES[:5])
    (source,) = result.stats.sources
    assert (source.model, source.text, source.first, source.samples) == (
        "tiny-llama",
        "text.txt",
        0,
        5,
    )


@pytest.mark.parametrize("stops", [[17], [16, 33], [39, 39], [3]])
def test_a_resumed_run_is_the_uninterrupted_one(
    stops: list[int], folder: Path, text: Path, output: Path, tmp_path: Path
) -> None:
    whole = run_plan(plan(folder, text, tmp_path / "whole.json")).stats
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan(folder, text, output), on_progress=stop_at(stop))
        if output.exists():
            partial = CalibrationStats.load(output)
            assert not partial.complete
            assert partial.samples == stop // 16 * 16
    begun: list[int] = []

    resumed = run_plan(
        plan(folder, text, output), on_progress=lambda done, of, tokens: begun.append(done)
    ).stats

    assert resumed == whole
    assert begun[0] == stops[-1] // 16 * 16, "what is saved is not run again"
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_more_samples_go_on_from_a_finished_run(folder: Path, text: Path, output: Path) -> None:
    run_plan(plan(folder, text, output, samples=10))
    more = run_plan(plan(folder, text, output, samples=20)).stats
    assert run_plan(plan(folder, text, output, samples=20)).stats == more, "nothing is run twice"
    anew = run_plan(plan(folder, text, output, samples=20), restart=True).stats
    assert more == anew
    with pytest.raises(CalibrationError, match="at most 5 samples to go on with, found 20"):
        run_plan(plan(folder, text, output, samples=5))


def test_a_batch_counts_what_its_samples_count_alone(
    folder: Path, text: Path, output: Path, tmp_path: Path
) -> None:
    alone = run_plan(plan(folder, text, output, samples=8)).stats
    batched = run_plan(plan(folder, text, tmp_path / "b.json", samples=8, batch_size=4)).stats

    assert (batched.samples, batched.tokens) == (alone.samples, alone.tokens)
    for name, record in alone.modules.items():
        found = batched.modules[name]
        assert (found.calls, found.unmasked_calls) == (2, 0)
        assert found.values == record.values, "padding does not count"
        assert found.amax == pytest.approx(record.amax, rel=1e-5)
    for name, cache in alone.kv_cache.items():
        assert batched.kv_cache[name].key_amax == pytest.approx(cache.key_amax, rel=1e-5)


def test_statistics_of_something_else_are_not_gone_on_with(
    folder: Path, text: Path, output: Path
) -> None:
    run_plan(plan(folder, text, output, samples=3))
    for changes in ({"sequence_length": 5}, {"exclude_first_tokens": 1}, {"kv_cache": False}):
        with pytest.raises(CalibrationError, match="same model, text and settings"):
            run_plan(plan(folder, text, output, **changes))
    text.write_text("other")
    with pytest.raises(CalibrationError, match="start anew with --force"):
        run_plan(plan(folder, text, output))
    assert run_plan(plan(folder, text, output), restart=True).stats.samples == 1


def test_experts_of_a_checkpoint_are_observed(tmp_path: Path, text: Path, output: Path) -> None:
    folder = save_checkpoint(mixtral(), tmp_path / "tiny-mixtral")
    stats = run_plan(plan(folder, text, output, samples=4)).stats
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name.removesuffix(".weight") for name in file.keys()}  # noqa: SIM118
    experts = "model.layers.0.block_sparse_moe.experts"
    expected = {f"{experts}.{index}.{part}" for index in range(8) for part in ("w1", "w2", "w3")}
    assert expected <= set(stats.modules) <= weights, "named as in the files"
    counts = [stats.modules[f"{experts}.{index}.w2"].values for index in range(8)]
    assert sum(counts) == 2 * stats.tokens * 48, "every token goes to two experts"
    assert run_plan(plan(folder, text, output, samples=6)).stats.samples == 6, "and it goes on"


def test_the_command_prints_a_summary_and_progress_lines(
    folder: Path, text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(folder, "--text", text, "-n", 3, "-o", output, "--method", "mse")

    out, err = capsys.readouterr()
    assert code == 0
    assert "3 samples" in out
    assert "model.layers.1.mlp.down_proj" in out
    assert "3 samples are few; 128 to 512 are usual" in out
    events = [json.loads(line) for line in err.splitlines()]
    assert [event["samples"] for event in events] == [0, 1, 2, 3]
    assert {event["event"] for event in events} == {"progress"}
    assert CalibrationStats.load(output).method == "mse"


def test_the_summary_as_json(
    folder: Path, text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(folder, "--text", text, "-n", 99, "-o", output, "--json", "--no-kv-cache")

    summary = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (summary["samples"], summary["layers"], summary["kv_cache_layers"]) == (40, 15, 0)
    assert len(summary["saturation"]) == 15
    assert summary["findings"][0] == "the text has 40 samples, 99 were asked for"
    assert summary["complete"] is True


def test_an_interrupted_command_says_how_to_go_on(
    folder: Path,
    text: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward, calls = run_module._forward, []

    def interrupted(model: Any, batch: list[list[int]]) -> None:
        calls.append(batch)
        if len(calls) == 20:
            raise KeyboardInterrupt
        forward(model, batch)

    monkeypatch.setattr(run_module, "_forward", interrupted)
    assert main(folder, "--text", text, "-n", 40, "-o", output) == 5
    assert f"goes on from what {output} holds" in capsys.readouterr().err
    assert CalibrationStats.load(output).samples == 16
    assert main(folder, "--text", text, "-n", 40, "-o", output) == 0
    assert CalibrationStats.load(output).samples == 40
    assert len(calls) == 20 + 24


def test_a_finding_of_outliers_comes_with_the_error_of_the_output(
    tmp_path: Path, text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama(intermediate_size=2048)
    layer = model.model.layers[1].mlp
    with torch.no_grad():  # one neuron in 2048 shouts: too few to move the 99.9th percentile
        for weight in (layer.up_proj.weight, layer.gate_proj.weight):
            weight[7] = 0
            weight[7, 0] = 3000.0
    folder = save_checkpoint(model, tmp_path / "loud")

    assert main(folder, "--text", text, "-n", 2, "-o", output) == 0

    out = capsys.readouterr().out
    assert "error of the output with these inputs in FP8" in out
    assert re.search(r"down_proj +\S +[\d.]+%, +[\d.]+% ", out)
    assert "- model.layers.1.mlp.down_proj: the largest input is" in out


def test_inputs_that_are_not_finite_fail_the_check(
    tmp_path: Path, text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = torch.inf
    folder = save_checkpoint(model, tmp_path / "broken")
    assert main(folder, "--text", text, "-n", 1, "-o", output) == 1
    assert "inputs were NaN or infinite" in capsys.readouterr().out


def test_parts_are_merged(
    folder: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for index in range(2):
        text = tmp_path / f"part{index}.txt"
        text.write_text("\n".join(LINES[index * 3 : index * 3 + 3]))
        files.append(tmp_path / f"part{index}.json")
        run_plan(plan(folder, text, files[-1]))

    assert main("--merge", *files, "-o", output) == 0

    assert "6 samples" in capsys.readouterr().out
    merged = CalibrationStats.load(output)
    assert [source.text for source in merged.sources] == ["part0.txt", "part1.txt"]
    counts = [CalibrationStats.load(file).modules["lm_head"].values for file in files]
    assert merged.modules["lm_head"].values == sum(counts)


def test_transformers_is_asked_for_by_its_extra(
    folder: Path,
    text: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checkpoint_module, "find_spec", lambda name: None)
    assert main(folder, "--text", text, "-o", output) == 2
    assert "pip install 'fp8dispatch[calibrate]'" in capsys.readouterr().err


def test_help_waits_for_nothing_heavy() -> None:
    code = """
import sys
from fp8dispatch import cli
try:
    cli.main(["calibrate", "--help"])
finally:
    heavy = {"torch", "transformers", "pydantic"}
    print("loaded:", *heavy.intersection(sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "safetensors and tokenizer files" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "loaded:"


def test_a_bar_is_shown_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    console = Console(file=sys.stderr, force_terminal=True, width=80)
    with command._progress(console) as on_progress:
        on_progress(3, 7, 100)
    err = capsys.readouterr().err
    assert "3/7" in err
    assert "event" not in err
