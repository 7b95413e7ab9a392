"""The numbers of the README are those of the result files, and there are no others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench import figures
from bench.figures import ROOT, check, unsupported
from bench.rounding import rounded

RESULTS = ROOT / "bench" / "results"


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


def test_every_number_of_the_readme_has_its_result(readme: str) -> None:
    wrong = [finding.text for finding in check(readme, RESULTS) if not finding.ok]

    assert wrong == []


def test_the_command_prints_what_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main([]) == 0
    assert "0 not right" in capsys.readouterr().out
    assert figures.main(["more"]) == 2


@pytest.mark.parametrize(
    "words",
    [
        r"(\d{4}) calls",
        r"\| \d+ \| (\d+) \| \d+ \|\n",
        r"takes ([\d.]+) s in blocks",
        r"(\d+) kills",
        r"a cosine of ([\d.]+)",
        r"is (\d+) times",
        r"`fbgemm` \(([\d.]+)\)",
    ],
)
def test_a_number_that_is_changed_in_the_readme_is_found(readme: str, words: str) -> None:
    number = re.search(words, readme)
    assert number is not None
    changed = readme[: number.start(1)] + "0.123" + readme[number.end(1) :]

    found = [one.text for one in check(changed, RESULTS) if not one.ok]

    assert any("not in the README, which the results say" in text for text in found)


def test_a_result_that_changes_is_found(readme: str, tmp_path: Path) -> None:
    changed = shutil.copytree(RESULTS, tmp_path / "results")
    host = json.loads((changed / "h200-host.json").read_text())
    gluon = next(row for row in host["host"] if row["backend"] == "gluon")
    gluon["us"]["fp8_linear"] = 1000.0
    (changed / "h200-host.json").write_text(json.dumps(host))
    (changed / "h200-suite.txt").write_text("1 failed, 1500 passed")
    (changed / "cpu-hypothesis.txt").unlink()

    found = [one.text for one in check(readme, changed) if not one.ok]

    assert any("busy for 1000 microseconds" in text for text in found)
    assert any("has failures that no later run mended" in text for text in found)
    assert any("FileNotFoundError" in text for text in found)


@pytest.mark.parametrize(
    "sentence",
    [
        "## Figures\n\nOurs is 1.7 times as fast as theirs.",
        "## Figures\n\n| 4096 x 4096 x 7168 | row | 999 | 1 | 2 |",
        "A call takes 12 us ([h200-new.json](bench/results/h200-new.json)).",
    ],
)
def test_a_number_without_a_claim_is_found(sentence: str) -> None:
    assert len(unsupported(sentence, [])) == 1


def test_names_of_types_and_files_and_numbers_elsewhere_are_no_figures() -> None:
    text = (
        "## Start\n\nPython 3.10 and 128x128 blocks.\n\n"
        "FP8 on an H200 in bf16 passes ([h200-suite.txt](bench/results/h200-suite.txt)).\n\n"
        "## Figures\n\nfloat64, `M = 16` and e4m3fn."
    )

    assert unsupported(text, []) == []


def test_halves_are_rounded_up() -> None:
    assert [rounded(2.05, 1), rounded(1.95, 1), rounded(0.5), rounded(82.36)] == [
        "2.1",
        "2.0",
        "1",
        "82",
    ]
