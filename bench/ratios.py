"""Ratios of arms over the rows of a result, with the noise of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
Pick = Callable[[Row], dict[str, Any]]
"""Where a row keeps ``us`` and ``spread_us``."""


class Ratio(NamedTuple):
    """How many times as fast one arm is as another at one point.

    Attributes:
        value: their microseconds, the other's over ours.
        noise: half the spread of both over the rounds, relative: what a repetition may change.
        label: the point.
    """

    value: float
    noise: float
    label: str


class Outcome(NamedTuple):
    """What a target came to.

    Attributes:
        reached: the threshold is met.
        text: the figure, in words.
    """

    reached: bool
    text: str


def ratio(row: Row, figures: dict[str, Any], ours: str, theirs: Sequence[str]) -> Ratio | None:
    """Ours against the fastest of the others that was timed; None where one side is missing."""
    us, spread = figures.get("us", {}), figures.get("spread_us", {})
    timed = [name for name in theirs if name in us]
    if ours not in us or not timed:
        return None
    best = min(timed, key=lambda name: us[name])
    noise = sum(spread[name] / us[name] / 2 for name in (ours, best))
    return Ratio(us[best] / us[ours], noise, f"{label(row)} ({best})")


def label(row: Row) -> str:
    """A point in a few words."""
    shape = [str(row[name]) for name in ("m", "n", "k") if name in row]
    said = [str(row[name]) for name in ("recipe", "part", "way", "experts", "rows") if name in row]
    return " ".join([*said, "x".join(shape)])


def collect(
    rows: Iterable[Row],
    pick: Pick,
    ours: str | Callable[[Row], str],
    theirs: Sequence[str],
) -> list[Ratio]:
    """The ratios of all rows that have both sides."""
    found = []
    for row in rows:
        name = ours if isinstance(ours, str) else ours(row)
        one = ratio(row, pick(row), name, theirs)
        if one is not None:
            found.append(one)
    return found


def mean_at_least(ratios: Sequence[Ratio], least: float) -> Outcome | None:
    """The geometric mean against a threshold; None without points."""
    if not ratios:
        return None
    mean = statistics.geometric_mean(one.value for one in ratios)
    return Outcome(mean >= least, f"{mean:.3f} over {len(ratios)} points")


def each_at_least(ratios: Sequence[Ratio], least: float) -> Outcome | None:
    """Every ratio against a threshold, beyond the noise of its two arms; None without points."""
    if not ratios:
        return None
    worst = min(ratios, key=lambda one: one.value * (1 + one.noise))
    below = [one for one in ratios if one.value * (1 + one.noise) < least]
    text = f"worst {worst.value:.3f} (noise {worst.noise:.1%}) at {worst.label}"
    return Outcome(not below, f"{text}; {len(below)} of {len(ratios)} points below")
