"""Checks every number of the README against its result file: ``python -m bench figures``.

Each claim of `bench.claims` is computed from ``bench/results`` and looked for in the README, word
for word. Then what is left: a digit in the section of figures, or in a sentence that links a result
file, which no claim accounts for, is a number without evidence.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.claims import Claim, claims

ROOT = Path(__file__).parent.parent
SECTION = "## Figures"


class Finding(NamedTuple):
    """One thing that was checked.

    Attributes:
        ok: README and results agree.
        text: what the results say, or what is wrong.
    """

    ok: bool
    text: str


def check(readme: str, results: Path) -> list[Finding]:
    """All claims, then the numbers that none of them covers."""

    def read(name: str) -> Any:
        text = (results / name).read_text("utf-8")
        return json.loads(text) if name.endswith(".json") else text

    words = " ".join(readme.split())
    findings, supported = [], []
    for claim in claims(read):
        finding = _compare(claim, read, words)
        findings.append(finding)
        if finding.ok:
            supported.append(finding.text)
    for sentence, numbers in unsupported(readme, supported):
        findings.append(Finding(False, f"no claim for {', '.join(numbers)} in: {sentence}"))
    return findings


def _compare(claim: Claim, read: Any, words: str) -> Finding:
    try:
        text = claim.text.format(*claim.values(read))
    except (AssertionError, KeyError, FileNotFoundError) as error:
        return Finding(False, f"not supported ({error!r}): {claim.text}")
    if text in words:
        return Finding(True, text)
    return Finding(False, f"not in the README, which the results say: {text}")


def unsupported(readme: str, supported: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Sentences with numbers that need a result and have none, with those numbers."""
    found = []
    for sentence in sentences_with_evidence(readme, supported):
        left = re.sub(r"\]\([^)]*\)", " ", sentence)  # targets of links
        left = re.sub(r"\[[^\]\s]*\.(json|txt)", " ", left)  # and files as their texts
        left = re.sub(r"`[^`]*`", " ", left)
        left = re.sub(r"\b[A-Za-z][\w-]*\d\w*\b", " ", left)  # FP8, bf16, H200
        left = re.sub(r"\bcapability \d+\.\d\b", " ", left)  # names a chip
        numbers = re.findall(r"\d[\d.,]*\d|\d", left)
        if numbers:
            found.append((sentence, numbers))
    return found


def sentences_with_evidence(readme: str, supported: Sequence[str]) -> list[str]:
    """What needs evidence, without the words that have it.

    The paragraphs of figures, and elsewhere each part of a sentence that links a result.
    """
    needing, inside = [], False
    for paragraph in re.split(r"\n(?=\|)|\n\s*\n", readme):
        flat = " ".join(paragraph.split())
        if flat.startswith("## "):
            inside = flat.startswith(SECTION)
        # The longest first: a short claim may be part of a long one.
        for text in sorted(supported, key=len, reverse=True):
            flat = flat.replace(text, "...")
        if inside:
            needing.append(flat)
        elif "bench/results/" in flat:
            # Ends of a sentence, or of a part that stands on its own.
            parts = re.split(r"(?<=\.) (?=[A-Z`*])|(?<=\)\)); ", flat)
            needing += [part for part in parts if "bench/results/" in part]
    return needing


def main(arguments: list[str]) -> int:
    """Print every finding; 1 where one of them differs."""
    if arguments:
        print("usage: python -m bench figures")
        return 2
    findings = check((ROOT / "README.md").read_text("utf-8"), ROOT / "bench" / "results")
    for finding in findings:
        print(f"{'ok    ' if finding.ok else 'DIFFERS'} {finding.text}")
    wrong = sum(not finding.ok for finding in findings)
    print(f"{len(findings)} checked, {wrong} not right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
