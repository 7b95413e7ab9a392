"""Pictures of results of `linear`, `gemm` and `decode`: ``python -m bench plot RESULT.json ...``.

For each recipe, beside the result: TFLOP/s against M under the roofline, microseconds at small M
over the memory floor, and the speed-up over bf16. A panel for each weight that was timed at three
or more M. Device times: graph replay with L2 flushed (`linear`, `gemm`), cold chains (`decode`).
The automatic choice is the dashed black line.

The roofline is the smaller of the FP8 peak of NVIDIA's datasheet (`bench.ceilings`) and of the
copy rate measured in the same run times the operations a byte: weight and activations in FP8,
output in bf16, each moved once. The floor is the same bytes at the same rate, or the kernel that
only reads the weight.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.ceilings import FP8_TFLOPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = 64
FEWEST = 3  # numbers of rows that make a line
MOST_WEIGHTS, ACROSS = 6, 3
TICKS = (50, 100, 200, 500, 1000, 2000)
# Okabe and Ito's palette, told apart with any kind of colour vision; the marker says it again.
STYLES: dict[str, tuple[str, str]] = {
    "gluon": ("#0072b2", "o"),
    "triton": ("#56b4e9", "s"),
    "cublaslt": ("#e69f00", "^"),
    "deepgemm": ("#d55e00", "v"),
    "fbgemm": ("#cc79a7", "D"),
    "fbgemm_tile": ("#cc79a7", "d"),
    "mslk": ("#f0e442", "P"),
    "torchao": ("#f0e442", "X"),
    "weight_only": ("#009e73", "<"),
    "eager": ("#009e73", ">"),
    "bf16": ("#777777", "*"),
    "read": ("#777777", "_"),
    "automatic": ("#000000", ""),
}
Row = dict[str, Any]


class Line(NamedTuple):
    """The arms of one row: M, N, K and microseconds by name."""

    m: int
    n: int
    k: int
    us: Mapping[str, float]


class Roof(NamedTuple):
    """What bounds a figure; None where neither the result nor a datasheet has it."""

    tb_s: float | None
    fp8_tflops: float | None

    def seconds_of_memory(self, m: int, n: int, k: int) -> float | None:
        return None if self.tb_s is None else (n * k + m * k + 2 * m * n) / (self.tb_s * 1e12)

    def tflops(self, m: int, n: int, k: int) -> float | None:
        """Of a multiplication that moves its operands once."""
        memory = self.seconds_of_memory(m, n, k)
        bounds = [] if memory is None else [2 * m * n * k / memory / 1e12]
        bounds += [] if self.fp8_tflops is None else [self.fp8_tflops]
        return min(bounds, default=None)


def main(arguments: list[str]) -> int:
    """Draw each result; returns 2 where there is nothing to draw."""
    if not arguments:
        print("usage: python -m bench plot RESULT.json ...")
        return 2
    drawn = [out for path in arguments for out in draw(Path(path))]
    for out in drawn:
        print(f"wrote {out}")
    return 0 if drawn else 2


def draw(source: Path) -> list[Path]:
    """Write the pictures of one result beside it."""
    result = json.loads(source.read_text("utf-8"))
    rows = [row for row in result[result["suite"]] if "m" in row and "recipe" in row]
    rows = [row for row in rows if row.get("accuracy", "exact") == "exact"]
    roof = roof_of(result)
    written = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        lines = [line_of(row) for row in rows if row["recipe"] == recipe and line_of(row).us]
        for kind, picture in PICTURES.items():
            chosen = columns([line for line in lines if picture.takes(line)])
            if chosen:
                out = source.with_name(f"{source.stem}-{recipe.replace(' ', '-')}-{kind}.png")
                _draw(out, picture, chosen, roof, _title(result, recipe))
                written.append(out)
    return written


def line_of(row: Row) -> Line:
    """Device microseconds of a row of any of the three suites."""
    figures = row.get("graph") or row.get("cold") or row
    return Line(row["m"], row["n"], row["k"], figures.get("us", {}))


def roof_of(result: Row) -> Roof:
    """The bounds of the machine that a result was measured on."""
    found = [row for row in result[result["suite"]] if row.get("part") == "ceilings"]
    rate = found[0]["copy_tb_s"] if found else None
    return Roof(rate, FP8_TFLOPS.get(result["machine"].get("gpu", "")))


def columns(lines: Sequence[Line]) -> dict[tuple[int, int], list[Line]]:
    """Lines by weight, those with enough M alone."""
    found: dict[tuple[int, int], list[Line]] = {}
    for line in sorted(lines, key=lambda one: one.m):
        found.setdefault((line.n, line.k), []).append(line)
    enough = {weight: some for weight, some in found.items() if len(some) >= FEWEST}
    return dict(list(enough.items())[:MOST_WEIGHTS])


class Picture(NamedTuple):
    """One kind of picture.

    Attributes:
        label: of the vertical axis.
        takes: which rows belong in it.
        value: of an arm, from its row and its microseconds; None leaves it out.
        bound: the line that it is drawn against.
        bound_label: what that is.
        log: the vertical axis is logarithmic.
    """

    label: str
    takes: Callable[[Line], bool]
    value: Callable[[Line, str], float | None]
    bound: Callable[[Roof, Line], float | None]
    bound_label: str
    log: bool


def _tflops(line: Line, name: str) -> float | None:
    return None if name == "read" else 2 * line.m * line.n * line.k / line.us[name] / 1e6


def _microseconds(line: Line, name: str) -> float | None:
    return None if name == "bf16" else line.us[name]


def _speed_up(line: Line, name: str) -> float | None:
    if name in ("bf16", "read") or "bf16" not in line.us:
        return None
    return line.us["bf16"] / line.us[name]


def _floor(roof: Roof, line: Line) -> float | None:
    seconds = roof.seconds_of_memory(line.m, line.n, line.k)
    return None if seconds is None else seconds * 1e6


PICTURES: dict[str, Picture] = {
    "tflops": Picture(
        "TFLOP/s",
        lambda line: line.m >= SMALL,
        _tflops,
        lambda roof, line: roof.tflops(line.m, line.n, line.k),
        "roofline (datasheet FP8 peak, measured copy rate)",
        log=True,
    ),
    "latency": Picture(
        "microseconds",
        lambda line: line.m <= SMALL,
        _microseconds,
        _floor,
        "memory floor (operands once, at the measured copy rate)",
        log=False,
    ),
    "speedup": Picture(
        "times as fast as bf16",
        lambda line: True,
        _speed_up,
        lambda roof, line: 1.0,
        "bf16",
        log=False,
    ),
}


def _title(result: Row, recipe: str) -> str:
    machine = result["machine"]
    cold = "weights never in L2" if result["suite"] == "decode" else "L2 flushed"
    what = {"linear": "whole linear, bf16 in and out", "gemm": "multiplication alone"}
    where = f"{machine.get('gpu', 'no GPU')}, torch {machine['versions']['torch']}"
    subject = what.get(result["suite"], "multiplication alone, few rows")
    return f"{subject}, {recipe}, {cold}: {where}, {machine['date']}"


def _draw(
    out: Path,
    picture: Picture,
    weights: Mapping[tuple[int, int], Sequence[Line]],
    roof: Roof,
    title: str,
) -> None:
    across = min(len(weights), ACROSS)
    down = -(-len(weights) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(max(4.2 * across, 6.4), 3.2 * down + 1.2),
        sharey=picture.log,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(weights) :]:
        axis.set_axis_off()
    for axis, ((n, k), lines) in zip(axes.flat, weights.items(), strict=False):
        _draw_weight(axis, picture, lines, roof)
        axis.set_title(f"N={n} K={k}", fontsize=9)
        axis.set_xlabel("M", fontsize=8)
    for row in axes:
        row[0].set_ylabel(picture.label)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw_weight(axis: Axes, picture: Picture, lines: Sequence[Line], roof: Roof) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line.us))
    for name in names:
        points = [
            (line.m, value)
            for line in lines
            if name in line.us and (value := picture.value(line, name)) is not None
        ]
        if not points:
            continue
        color, marker = STYLES.get(name, ("#000000", "."))
        automatic = name == "automatic"
        axis.plot(
            *zip(*points, strict=True),
            label=name,
            color=color,
            marker=marker or None,
            markersize=4,
            linewidth=1.2,
            linestyle="--" if automatic else "-." if name.endswith("_tile") else "-",
            zorder=3 if automatic else 2,
        )
    bounds = [(line.m, bound) for line in lines if (bound := picture.bound(roof, line)) is not None]
    if bounds:
        axis.plot(
            *zip(*bounds, strict=True),
            label=picture.bound_label,
            color="#999999",
            linestyle=":",
            linewidth=1.5,
            zorder=1,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks([line.m for line in lines], [str(line.m) for line in lines])
    axis.minorticks_off()
    if picture.log:
        axis.set_yscale("log")
        axis.set_yticks(TICKS, [str(tick) for tick in TICKS])
        axis.minorticks_off()
    else:
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=7)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
