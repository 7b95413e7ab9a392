"""The file of statistics: what is written is what is read, what is merged is exact."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch.calibrate import stats as stats_module
from fp8dispatch.calibrate.magnitudes import BIN_COUNT, Magnitudes
from fp8dispatch.calibrate.stats import (
    HISTORY_LENGTH,
    CalibrationStats,
    KVRecord,
    SourceRecord,
    merge_stats,
    record_of,
)
from fp8dispatch.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable


def example(x: torch.Tensor | None = None, **changes: Any) -> CalibrationStats:
    x = torch.randn(5, 8) if x is None else x
    fields: dict[str, Any] = {
        "samples": 2,
        "tokens": 5,
        "sources": [SourceRecord(model="m", model_sha256="ab", text="t", samples=2)],
        "modules": {"layers.0.up_proj": record_of(Magnitudes.of(x), 8, 1, [1.5])},
        "kv_cache": {"layers.0.attn": KVRecord(key_amax=[1.0, 2.0], value_amax=[0.5])},
    }
    return CalibrationStats(**{**fields, **changes})


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    stats = example(torch.tensor([[0.0] * 7 + [3.4e38], [2.0**-149] * 8]))
    path = tmp_path / "stats.json"

    stats.save(path)

    assert CalibrationStats.load(path) == stats
    assert sorted(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "as readable as other files"


def test_the_histogram_comes_back_whole() -> None:
    magnitudes = Magnitudes.of(torch.randn(1000) * torch.logspace(-30, 20, 1000))
    again = record_of(magnitudes, 8, 1).magnitudes()
    assert torch.equal(again.counts, magnitudes.counts)
    assert (again.values, again.zeros, again.amax) == (1000, 0, magnitudes.amax)


def test_the_documented_example_is_valid() -> None:
    """The JSON in the module's docstring, without its remarks and with a histogram that adds up."""
    text = (stats_module.__doc__ or "").split("JSON, one object:")[1].split("Bin b of")[0]
    shown = "".join(line.strip().split("  ")[0] for line in text.splitlines())
    shown = shown.replace("{...}", "{}").replace('"values": 18050112', '"values": 18')

    stats = CalibrationStats.model_validate_json(shown)

    assert stats.modules["model.layers.0.mlp.up_proj"].amax == 13.25
    undocumented = set(CalibrationStats.model_fields) - set(json.loads(shown))
    assert undocumented == set()


@given(st.lists(st.lists(st.floats(width=32), min_size=1), min_size=2, max_size=4))
def test_merged_statistics_are_those_of_one_run(parts: list[list[float]]) -> None:
    def run(values: list[list[float]], first: int) -> CalibrationStats:
        magnitudes, history = Magnitudes(), []
        for part in values:
            found = Magnitudes.of(torch.tensor(part))
            magnitudes.add(found)
            history.append(found.amax)
        source = SourceRecord(model="m", first=first, samples=len(values))
        record = record_of(magnitudes, 1, len(values), history)
        return CalibrationStats(samples=len(values), sources=[source], modules={"a": record})

    whole = run(parts, 0)
    apart = [run([part], index) for index, part in enumerate(parts)]

    assert merge_stats(*apart) == whole
    assert merge_stats(merge_stats(*apart[:2]), *apart[2:]) == whole


def test_merging_keeps_what_only_one_has() -> None:
    one = example(modules={"a": record_of(Magnitudes.of(torch.ones(1, 3)), 3, 1)})
    two = example(
        modules={"b": record_of(Magnitudes.of(torch.ones(1, 4)), 4, 1)},
        kv_cache={
            "layers.0.attn": KVRecord(key_amax=[3.0, 0.0], value_amax=[0.1]),
            "layers.1.attn": KVRecord(key_amax=[1.0], value_amax=[1.0]),
        },
        complete=False,
    )

    merged = merge_stats(one, two)

    assert list(merged.modules) == ["a", "b"]
    assert merged.kv_cache["layers.0.attn"] == KVRecord(key_amax=[3.0, 2.0], value_amax=[0.5])
    assert list(merged.kv_cache) == ["layers.0.attn", "layers.1.attn"]
    assert (merged.samples, merged.tokens, merged.complete) == (4, 10, False)
    assert len(merged.sources) == 2


def test_a_history_keeps_the_newest() -> None:
    def part(*history: float) -> CalibrationStats:
        record = record_of(Magnitudes.of(torch.ones(1)), 1, 1, history)
        return CalibrationStats(modules={"a": record})

    merged = merge_stats(part(*range(HISTORY_LENGTH)), part(7.0, 8.0))
    history = merged.modules["a"].amax_history
    assert len(history) == HISTORY_LENGTH
    assert history[:1] + history[-2:] == [2.0, 7.0, 8.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": [SourceRecord(model="n", model_sha256="cd")]}, "those of m and n"),
        (
            {"modules": {"layers.0.up_proj": record_of(Magnitudes(), 9, 0)}},
            "layers.0.up_proj with 8 and with 9 inputs",
        ),
        (
            {"kv_cache": {"layers.0.attn": KVRecord(key_amax=[1.0], value_amax=[1.0])}},
            "layers.0.attn with 2 and with 1 heads",
        ),
    ],
)
def test_statistics_of_two_models_are_not_merged(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words) as caught:
        merge_stats(example(), example(**changes))
    assert "\n" not in str(caught.value)


def damaged(change: Callable[[dict[str, Any]], object]) -> str:
    value = json.loads(example().model_dump_json())
    change(value)
    return json.dumps(value)


def module(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = value["modules"]["layers.0.up_proj"]
    return found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file"),
        ("[]", "the file"),
        ('{"format": "other"}', "format"),
        (damaged(lambda value: value.update(schema_version=2)), "schema_version"),
        (damaged(lambda value: value.update(surprise=1)), "surprise"),
        (damaged(lambda value: value.update(samples=-1)), "samples"),
        (damaged(lambda value: value.update(percentile=0)), "percentile"),
        (damaged(lambda value: module(value).update(amax=-1.0)), "up_proj.amax"),
        (damaged(lambda value: module(value).update(amax=1e39)), "up_proj.amax"),
        (damaged(lambda value: module(value).update(amax=float("nan"))), "up_proj.amax"),
        (damaged(lambda value: module(value).update(values=7)), "do not add up"),
        (damaged(lambda value: module(value).update(amax_history=[1.0] * 2000)), "amax_history"),
        (
            damaged(lambda value: module(value)["histogram"].update(first=BIN_COUNT - 1)),
            "beyond the last bin",
        ),
        (damaged(lambda value: module(value)["histogram"].update(counts=[-1])), "histogram.counts"),
        (damaged(lambda value: value["kv_cache"]["layers.0.attn"].update(key_amax=[])), "key_amax"),
        ("[" * 100_000, "the file"),
    ],
)
def test_damaged_files_are_refused_in_a_sentence(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    path.write_text(content)

    with pytest.raises(CalibrationError, match=words) as caught:
        CalibrationStats.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CalibrationError, match="No such file"):
        CalibrationStats.load(tmp_path / "none.json")
    with pytest.raises(CalibrationError, match="directory"):
        CalibrationStats.load(tmp_path)
    with pytest.raises(CalibrationError, match="name another file"):
        example().save(tmp_path / "none" / "stats.json")
    example().save(tmp_path / "large.json")
    monkeypatch.setattr(stats_module, "_LARGEST_FILE", 10)
    with pytest.raises(CalibrationError, match="less than 10 bytes"):
        CalibrationStats.load(tmp_path / "large.json")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stats.json"
    old = example()
    old.save(path)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CalibrationError, match="No space left"):
        example(samples=9).save(path)
    assert CalibrationStats.load(path) == old
    assert sorted(tmp_path.iterdir()) == [path], "nothing is left behind"
