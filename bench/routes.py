"""Routes from a result of `linear`: ``python -m bench routes RESULT.json [--write]``.

For each recipe, the measured numbers of rows are taken in order, and so are the numbers of output
tiles at each. A backend serves a class of calls where at no point of it, eager or captured, it
costs over 5 % and over 2 us more than the best; where none does, the class is split by tiles. The
order inside a route is by the geometric mean of the cost over the best. Ranges meet halfway (in the
logarithm) between what was measured.

``--write`` replaces `fp8dispatch/routes.json`, whose routes then name RESULT.json as evidence.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.linear import SLACK, SLACK_US
from fp8dispatch.routes import TILE

KINDS = ("eager", "graph")
ROUTES = Path(__file__).parent.parent / "fp8dispatch" / "routes.json"
Point = dict[str, Any]


def routes_of(result: dict[str, Any], evidence: str) -> list[dict[str, Any]]:
    """The routes that a result supports."""
    routes: list[dict[str, Any]] = []
    timed = [row for row in result["linear"] if "eager" in row and row["accuracy"] == "exact"]
    for recipe, points in groupby(timed, key=lambda point: point["recipe"]):
        by_rows = sorted(points, key=lambda point: point["m"])
        rows = sorted({point["m"] for point in by_rows})
        for m, group in groupby(by_rows, key=lambda point: point["m"]):
            low, high = _between(rows, m)
            for tiles_low, tiles_high, order in _classes(list(group)):
                # Per-tensor weights run the per-row kernels, their one scale spread.
                recipes = [recipe, "tensor"] if recipe == "row" else [recipe]
                route: dict[str, Any] = {"capability": [9, 0], "recipes": recipes}
                limits = [("m_min", low), ("m_max", high)]
                limits += [("tiles_min", tiles_low), ("tiles_max", tiles_high)]
                route |= {name: limit for name, limit in limits if limit is not None}
                routes.append(route | {"order": order, "evidence": evidence})
    return _joined(routes)


def _between(values: list[int], value: int) -> tuple[int | None, int | None]:
    """The range that belongs to one of the measured values; None where it is open."""
    index = values.index(value)
    low = None if index == 0 else math.isqrt(values[index - 1] * value) + 1
    high = None if index == len(values) - 1 else math.isqrt(value * values[index + 1])
    return low, high


def _classes(points: list[Point]) -> list[tuple[int | None, int | None, list[str]]]:
    """The points of one M as (fewest tiles, most tiles, order), split where one order is late."""
    points = sorted(points, key=_tiles)
    counts = sorted({_tiles(point) for point in points})
    classes: list[tuple[int | None, int | None, list[str]]] = []
    taken: list[Point] = []
    for count in counts:
        here = [point for point in points if _tiles(point) == count]
        if taken and not _is_late(taken + here, _order(taken + here)[0]):
            taken += here
            continue
        if taken:
            edge = math.isqrt(_tiles(taken[-1]) * count)
            start = None if not classes else (classes[-1][1] or 0) + 1
            classes.append((start, edge, _order(taken)))
        taken = here
    start = None if not classes else (classes[-1][1] or 0) + 1
    return [*classes, (start, None, _order(taken))]


def _tiles(point: Point) -> int:
    return -(-point["m"] // TILE) * -(-point["n"] // TILE)


def _order(points: list[Point]) -> list[str]:
    """The backends that ran all of the points: those that are never late first, then by cost."""
    names = set.intersection(*(set(point["selectable"]) for point in points))
    return sorted(names, key=lambda name: (_is_late(points, name), _cost(points, name)))


def _cost(points: list[Point], name: str) -> float:
    return sum(
        math.log(point[kind]["us"][name] / _best(point, kind)) for point in points for kind in KINDS
    )


def _is_late(points: list[Point], name: str) -> bool:
    return any(
        (us := point[kind]["us"][name]) > _best(point, kind) * SLACK
        and us > _best(point, kind) + SLACK_US
        for point in points
        for kind in KINDS
    )


def _best(point: Point, kind: str) -> float:
    return min(point[kind]["us"][name] for name in point["selectable"])


def _joined(routes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours that differ in nothing but the rows they hold for, as one."""
    joined: list[dict[str, Any]] = []
    for route in routes:
        last = joined[-1] if joined else {}
        same = all(
            last.get(name) == route.get(name)
            for name in ("recipes", "order", "tiles_min", "tiles_max")
        )
        whole = "tiles_min" not in route and "tiles_max" not in route
        if same and whole:
            last.pop("m_max", None)
            last |= {"m_max": route["m_max"]} if "m_max" in route else {}
        else:
            joined.append(route)
    return joined


def main(arguments: list[str]) -> int:
    """Print the routes, or write them."""
    if len(arguments) not in (1, 2) or arguments[1:] not in ([], ["--write"]):
        print("usage: python -m bench routes RESULT.json [--write]")
        return 2
    path = Path(arguments[0])
    result = json.loads(path.read_text("utf-8"))
    if result["rehearsal"]:
        print(f"{path} is a rehearsal: its figures mean nothing, and make no routes")
        return 1
    lines = ",\n  ".join(
        json.dumps(route) for route in routes_of(result, f"bench/results/{path.name}")
    )
    text = f'{{\n "routes": [\n  {lines}\n ]\n}}\n'
    if arguments[1:]:
        ROUTES.write_text(text, "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
