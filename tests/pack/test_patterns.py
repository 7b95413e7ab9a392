"""Patterns of configurations: the answers of `re.match`, in time that a hostile one cannot stretch.

Time is counted in steps of the automaton, never measured.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fp8dispatch
from fp8dispatch.errors import CheckpointError, InvalidInputError
from fp8dispatch.pack.layouts import patterns
from fp8dispatch.pack.layouts.patterns import compile_pattern
from fp8dispatch.pack.scheme import SCHEMES
from tests.pack.folders import assert_one_sentence
from tests.pack.packing import random_weight, write_packed

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.3.mlp.experts.127.gate_proj",
    "model.layers.3.mlp.gate",
    "visual.blocks.0.attn.qkv",
    "",
    "a-b]c{2}",
]
USED = [
    r".*self_attn.*",
    r".*\.mlp\..*_proj$",
    r"model.layers.\d+.mlp.experts.\d+.(gate|up|down)_proj$",
    r"^(?!.*(lm_head|visual)).*$",
    r"^(?=.*mlp)(?!.*experts).*",
    r"(?:model\.)?layers[.][0-9]{1,2}\.mlp",
    r"model\.layers\.(?P<number>[1-9]\d?|0)\.",
    r".*(?:q|k|v|o)_proj",
    r"[^.]+$",
    r"[a\-]+[]b]?",
    r"\w+\W\w*?\.\D",
    r"a-b\]c\{2}",
    r"(|x|lm_head)$",
    r"$",
    r"",
]


@pytest.mark.parametrize("pattern", USED)
def test_patterns_of_real_configurations_match_as_in_re(pattern: str) -> None:
    for name in NAMES:
        wanted = re.match(pattern, name) is not None
        assert compile_pattern(pattern).matches(name) == wanted, name


def parts() -> st.SearchStrategy[str]:
    """Patterns of the language over three letters."""
    atom = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a]", "^", "$"])

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        # re refuses to repeat a repetition, and so does this language: it takes a group.
        return st.one_of(
            st.lists(inner, min_size=1, max_size=3).map("".join),
            st.lists(inner, min_size=1, max_size=3).map(lambda found: f"({'|'.join(found)})"),
            st.tuples(
                inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{0}", "{1,}", "{0,2}", "{,2}"])
            ).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        )

    return st.recursive(atom, larger, max_leaves=6)


@given(parts(), st.text("ab.1", max_size=6), st.sampled_from(["", "(?!{})", "^(?={})"]), parts())
def test_any_pattern_matches_as_in_re(pattern: str, name: str, ahead: str, other: str) -> None:
    whole = ahead.format(other) + pattern
    try:
        wanted = re.match(whole, name) is not None
    except re.error:
        pytest.fail(f"{whole} is meant to be an expression")

    assert compile_pattern(whole).matches(name) == wanted


class Counted(dict):  # type: ignore[type-arg]
    """Counts the steps that the automaton asks for."""

    asked = 0

    def get(self, key: object, default: object = None) -> object:
        Counted.asked += 1
        return super().get(key, default)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(a|a)*$",
        r"(.*)*x",
        r".*.*.*.*.*.*.*.*.*.*x",
        r"(a?){50}a{50}$",
        r"((a*)*)*b",
        r"^(?!(a*)*b).*x",
    ],
)
def test_hostile_patterns_take_a_step_for_each_character(pattern: str) -> None:
    """`re` needs 2 ** 2000 steps for some of these."""
    found = compile_pattern(pattern)
    machines = [found._machine, *(machine for machine, _ in found._lookaheads)]
    for machine in machines:
        machine._steps = Counted()
    Counted.asked = 0

    found.matches("a" * 2000 + "!")

    assert Counted.asked <= 2001 * len(machines)
    assert all(len(machine._nodes) <= patterns.MOST_NODES for machine in machines)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a" * 513, "at most 512 characters, found 513"),
        ("(a{100}){100}", "at most 1000 states"),
        ("(" * 30 + "a" + ")" * 30, "at most 20 groups in each other"),
        ("a{1,101}", "100 at most"),
        ("a{3,2}", "in order"),
        ("a{x}", "numbers in braces"),
        ("(a", r"needs a \) at character 3"),
        ("a)", r"a \( for each \)"),
        ("[a", "an end"),
        ("a**", "one repetition"),
        ("a*+", "one repetition"),
        ("*a", "something to repeat"),
        (r"(a)\1", r"no \\1"),
        (r"a\b", r"no \\b"),
        ("a(?!b)", "needs a :"),
        ("(?<=a)b", "needs a :"),
        ("(?i)a", "needs a :"),
        ("[z-a]", "in order"),
        ("a\\", "an end"),
    ],
)
def test_what_is_beyond_the_language_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        compile_pattern(pattern)


@pytest.mark.parametrize("pattern", [r"(a)\1", "(", "a" * 600, "(a{100}){100}"])
def test_a_checkpoint_with_such_a_target_is_refused(pattern: str, tmp_path: Path) -> None:
    weights = {"layers.0.q_proj": random_weight(64, 64)}
    folder = write_packed(tmp_path, weights, "ct", SCHEMES["channel"])
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('["Linear"]', f'["re:{pattern}"]'.replace("\\", "\\\\"))
    )

    with pytest.raises(CheckpointError) as caught:
        fp8dispatch.load(folder, model=torch.nn.Linear(1, 1))

    assert_one_sentence(str(caught.value), "config_groups", "correct config.json")
