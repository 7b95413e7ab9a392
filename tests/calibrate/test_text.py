"""Samples of a text file, and how they become tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fp8dispatch.calibrate.text import read_text, tokenize

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("content", "name", "samples"),
    [
        ("one\n\n  two \n", "t.txt", ("one", "two")),
        ('"one"\n{"text": "two"}\n{"prompt": "three", "id": 3}\n', "t.jsonl", None),
    ],
)
def test_samples_are_the_lines_of_a_file(
    content: str, name: str, samples: tuple[str, ...] | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert read_text(path).samples == (samples or ("one", "two", "three"))


class Letters:
    """A tokenizer of letters that begins each text with 1."""

    bos_token_id = 1

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        ids = ids if options.get("add_special_tokens") is False else [1, *ids]
        return {"input_ids": ids[: options.get("max_length", len(ids))]}


def test_a_text_is_cut_into_pieces_of_equal_length(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcd\nefgh\nij")
    text = read_text(path)

    def cut(split: Any, samples: int = 9, length: int = 5) -> list[str]:
        ids = tokenize(text, Letters(), split=split, samples=samples, length=length)
        assert all(piece[0] == 1 for piece in ids)
        return ["".join(map(chr, piece[1:])) for piece in ids]

    assert cut("chunks") == ["abcd", "\nefg", "h\nij"]
    assert cut("chunks", length=6) == ["abcd\n", "efgh\n"], "a short rest is left out"
    assert cut("chunks", length=99) == ["abcd\nefgh\nij"], "unless it is all there is"
    assert cut("lines", length=4) == ["abc", "efg", "ij"]
    assert cut("lines", samples=1) == ["abcd"]
