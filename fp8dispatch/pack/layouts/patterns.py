"""Patterns of a checkpoint's configuration, matched in linear time.

Python's `re` backtracks: a few nested or adjacent repetitions, which anyone can write into a
``config.json``, keep it busy for years. So the part of its language that such files use is compiled
here into an automaton, whose time grows with the length of the name alone (K. Thompson, "Regular
Expression Search Algorithm", CACM 11(6), 1968): literals, ``.``, ``\\d \\w \\s`` and their
opposites, classes ``[...]``, groups, ``|``, ``* + ?`` and ``{m,n}``, ``^`` and ``$``, and
lookaheads at the very beginning. Everything else is refused. As with `re.match`, a pattern begins
at the name's first character and need not reach its last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from fp8dispatch.errors import InvalidInputError

LONGEST = 512
"""Characters of a pattern."""
MOST_NODES = 1000
DEEPEST = 20
_MOST_REPEATS = 100
_KEPT_STEPS = 4096

_DIGITS = frozenset("0123456789")
_WORDS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_") | _DIGITS
_CLASSES = {"d": _DIGITS, "w": _WORDS, "s": frozenset(" \t\n\r\f\v")}
_START, _END, _MATCH = "start", "end", "match"


@dataclass(frozen=True)
class _Characters:
    """A set of characters, or all others."""

    members: frozenset[str]
    negated: bool = False

    def __contains__(self, character: str) -> bool:
        return (character in self.members) != self.negated


_ANY = _Characters(frozenset("\n"), negated=True)


@dataclass
class _Node:
    """A state: it reads a character, demands an end of the name, or is passed freely."""

    reads: _Characters | str | None
    to: list[int] = field(default_factory=list)


class Pattern:
    """A compiled pattern; make it with `compile_pattern`."""

    def __init__(self, text: str) -> None:
        parser = _Parser(text)
        self._lookaheads = parser.lookaheads()
        self._machine = parser.machine()

    def matches(self, name: str) -> bool:
        """Whether the pattern matches at the beginning of a name."""
        return self._machine.matches(name) and all(
            machine.matches(name) != negated for machine, negated in self._lookaheads
        )


@lru_cache(maxsize=256)
def compile_pattern(text: str) -> Pattern:
    """Compile a pattern.

    Raises:
        InvalidInputError: a pattern that is too long or large, damaged, or beyond the language of
            this module.
    """
    return Pattern(text)


class _Machine:
    """An automaton without backtracking: it is in all its states at once."""

    def __init__(self, nodes: list[_Node], first: int) -> None:
        self._nodes = nodes
        self._begin = self._closure([first], at_start=True, at_end=False)
        self._empty = self._closure([first], at_start=True, at_end=True)
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._match = next(at for at, node in enumerate(nodes) if node.reads == _MATCH)

    def matches(self, name: str) -> bool:
        if not name:
            return self._match in self._empty
        states = self._begin
        for character in name:
            if self._match in states:
                return True
            states = self._step(states, character)
            if not states:
                return False
        return self._match in self._closure(states, at_start=False, at_end=True)

    def _step(self, states: frozenset[int], character: str) -> frozenset[int]:
        found = self._steps.get((states, character))
        if found is None:
            if len(self._steps) >= _KEPT_STEPS:
                self._steps.clear()
            reached = [
                self._nodes[at].to[0]
                for at in states
                if isinstance(reads := self._nodes[at].reads, _Characters) and character in reads
            ]
            found = self._closure(reached, at_start=False, at_end=False)
            self._steps[states, character] = found
        return found

    def _closure(self, states: object, at_start: bool, at_end: bool) -> frozenset[int]:
        """All states that are reached from these without reading a character."""
        waiting, seen = list(states), set()  # type: ignore[call-overload]
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            node = self._nodes[at]
            free = node.reads is None
            if free or (node.reads == _START and at_start) or (node.reads == _END and at_end):
                waiting.extend(node.to)
        return frozenset(seen)


class _Parser:
    """Text into automata; each part is a pair (first node, last node)."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise InvalidInputError(
                f"a pattern must have at most {LONGEST} characters, found {len(text)}"
            )
        self._text, self._at, self._depth = text, 0, 0
        self._nodes: list[_Node] = []

    def lookaheads(self) -> list[tuple[_Machine, bool]]:
        """Those at the beginning, behind a ``^`` if there is one, and whether each is negative."""
        while self._text.startswith("^", self._at):
            self._at += 1
        found = []
        while self._text.startswith(("(?=", "(?!"), self._at):
            negated = self._text[self._at + 2] == "!"
            self._at += 3
            self._nodes = []
            first = self._finished(self._alternatives())
            self._expect(")")
            if self._peek() in ("*", "+", "?", "{"):
                raise self._error("something to repeat")
            found.append((_Machine(self._nodes, first), negated))
        return found

    def machine(self) -> _Machine:
        """The rest of the pattern."""
        self._nodes = []
        first = self._finished(self._alternatives())
        if self._at < len(self._text):
            raise self._error("a ( for each )")
        return _Machine(self._nodes, first)

    def _finished(self, part: tuple[int, int]) -> int:
        self._nodes[part[1]].to.append(self._node(_MATCH))
        return part[0]

    def _node(self, reads: _Characters | str | None, *to: int) -> int:
        if len(self._nodes) >= MOST_NODES:
            raise InvalidInputError(
                f"a pattern must need at most {MOST_NODES} states, found more in "
                f"{self._text[:60]!r}"
            )
        self._nodes.append(_Node(reads, list(to)))
        return len(self._nodes) - 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        character = self._peek()
        if not character:
            raise self._error("an end to what was begun")
        self._at += 1
        return character

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._error(f"a {character}")
        self._at += 1

    def _error(self, need: str) -> InvalidInputError:
        return InvalidInputError(
            f"a pattern needs {need} at character {self._at + 1}, found {self._text[:60]!r}"
        )

    def _alternatives(self) -> tuple[int, int]:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._error(f"at most {DEEPEST} groups in each other")
        parts = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            parts.append(self._sequence())
        self._depth -= 1
        if len(parts) == 1:
            return parts[0]
        last = self._node(None)
        for _, end in parts:
            self._nodes[end].to.append(last)
        return self._node(None, *(begin for begin, _ in parts)), last

    def _sequence(self) -> tuple[int, int]:
        first = last = self._node(None)
        while self._peek() not in ("", "|", ")"):
            begin, end = self._repeated()
            self._nodes[last].to.append(begin)
            last = end
        return first, last

    def _repeated(self) -> tuple[int, int]:
        begun = self._at
        part = self._single()
        low, high = self._repeats()
        if (low, high) == (1, 1):
            return part
        stop = self._at
        first = last = self._node(None)
        copies = [part]
        for _ in range(max(low, high or low, 1) - 1):  # parsed again: a copy of its own nodes
            self._at = begun
            copies.append(self._single())
        self._at = stop
        leave = self._node(None)
        for number, (begin, end) in enumerate(copies):
            self._nodes[last].to.append(begin)
            if number >= low:
                self._nodes[last].to.append(leave)
            last = self._node(None)
            self._nodes[end].to.append(last)
        if high is None:
            self._nodes[last].to.append(copies[-1][0])
            if low == 0:
                self._nodes[first].to.append(leave)
        self._nodes[last].to.append(leave)
        return first, leave

    def _repeats(self) -> tuple[int, int | None]:
        """The fewest and the most repetitions behind a part; None for any number."""
        character = self._peek()
        found: tuple[int, int | None] = (1, 1)
        if character in ("*", "+", "?") and character:
            self._at += 1
            found = {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        elif character == "{":
            stop = self._text.find("}", self._at)
            low, comma, high = self._text[self._at + 1 : stop].partition(",")
            if stop < 0 or not (low + high).isdecimal() or not (low + high).isascii():
                raise self._error("numbers in braces, or \\{ for a brace,")
            self._at = stop + 1
            fewest = int(low or 0)
            most = int(high) if high else None if comma else fewest
            if max(fewest, most or 0) > _MOST_REPEATS or (most is not None and most < fewest):
                raise self._error(f"repetitions in order, {_MOST_REPEATS} at most,")
            found = (fewest, most)
        else:
            return found
        if self._peek() == "?":
            self._at += 1  # as few as possible: the same names match
        if self._peek() in ("*", "+", "?", "{") and self._peek():
            raise self._error("one repetition of a part")
        return found

    def _single(self) -> tuple[int, int]:
        character = self._next()
        if character == "(":
            if self._peek() == "?":
                self._at += 1
                if self._text.startswith("P<", self._at):
                    self._at = self._text.find(">", self._at) + 1 or len(self._text)
                else:
                    self._expect(":")  # lookarounds within a pattern and flags are refused
            part = self._alternatives()
            self._expect(")")
            return part
        if character in "*+?{":
            raise self._error("something to repeat")
        kinds: dict[str, _Characters | str] = {"^": _START, "$": _END, ".": _ANY}
        if character == "[":
            reads: _Characters | str = self._class()
        elif character == "\\":
            reads = self._escaped()
        else:
            reads = kinds.get(character, _Characters(frozenset(character)))
        last = self._node(None)
        return self._node(reads, last), last

    def _escaped(self) -> _Characters:
        character = self._next()
        if character.lower() in _CLASSES:
            return _Characters(_CLASSES[character.lower()], negated=character.isupper())
        if character.isalnum():
            raise self._error(f"no \\{character}, which is beyond what is matched here,")
        return _Characters(frozenset(character))

    def _class(self) -> _Characters:
        negated = self._peek() == "^"
        self._at += negated
        members: set[str] = set()
        first = True
        while first or self._peek() != "]":
            first = False
            character = self._next()
            if character == "\\":
                found = self._escaped()
                if found.negated:
                    raise self._error("no \\D, \\W or \\S in a class")
                members |= found.members
                if len(found.members) > 1:
                    continue
                (character,) = found.members
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                stop = self._next()
                if stop in "\\[" or ord(stop) < ord(character) or ord(stop) > 0x7F:
                    raise self._error("a range of ASCII characters in order")
                members |= {chr(code) for code in range(ord(character), ord(stop) + 1)}
            members.add(character)
        self._at += 1
        return _Characters(frozenset(members), negated)
