"""Samples of text: one on each line of a file, or a long text cut into pieces of equal length."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fp8dispatch.errors import CalibrationError

Split = Literal["lines", "chunks"]
_FIELDS = ("text", "prompt", "content")


@dataclass(frozen=True)
class Text:
    """A text file.

    Attributes:
        name: of the file.
        sha256: of its bytes.
        samples: its lines that are not blank; in a .jsonl file what stands in their field
            ``text``, ``prompt`` or ``content``.
    """

    name: str
    sha256: str
    samples: tuple[str, ...]


def read_text(path: Path) -> Text:
    """Read a .txt or .jsonl file.

    Raises:
        CalibrationError: it cannot be read, is not UTF-8, or holds no sample.
    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise CalibrationError(
            f"the text must be in a file that can be read, found {path} ({error.strerror}); name "
            f"another with --text"
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"the text must be UTF-8, found another encoding in {path} at byte {error.start}; "
            f"convert it"
        ) from error
    filled = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix in (".jsonl", ".json"):
        samples = [_from_json(path, number, line) for number, line in filled]
    else:
        samples = [line for _, line in filled]
    if not samples:
        raise CalibrationError(f"the text must hold a sample, found none in {path}; add lines")
    return Text(path.name, hashlib.sha256(content).hexdigest(), tuple(samples))


def tokenize(
    text: Text, tokenizer: Any, *, split: Split, samples: int, length: int
) -> list[list[int]]:
    """Token ids of the first `samples` samples, each of at most `length` tokens.

    Args:
        text: what was read.
        tokenizer: of Transformers.
        split: ``"lines"``: one sample for each of the text's; ``"chunks"``: all of them joined and
            cut every `length` tokens, the last piece left out if others are there.
        samples: how many at most.
        length: tokens of a sample, special ones included.
    """
    if split == "lines":
        return [
            list(tokenizer(sample, truncation=True, max_length=length)["input_ids"])
            for sample in text.samples[:samples]
        ]
    ids = list(tokenizer("\n".join(text.samples), add_special_tokens=False)["input_ids"])
    begin = _beginning(tokenizer)
    step = max(length - len(begin), 1)
    pieces = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    if len(pieces) > 1 and len(pieces[-1]) < length:
        pieces.pop()
    return pieces[:samples]


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    first = list(tokenizer("a")["input_ids"])[:1]
    bos = getattr(tokenizer, "bos_token_id", None)
    return first if bos is not None and first == [bos] else []


def _from_json(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = next((value[name] for name in _FIELDS if isinstance(value.get(name), str)), None)
    if not isinstance(value, str) or not value.strip():
        raise CalibrationError(
            f"line {number} of {path} must be a JSON string or an object with a text under one of "
            f"{', '.join(_FIELDS)}, found {line[:60]!r}; repair it"
        )
    return value
