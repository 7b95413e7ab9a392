"""Draws a result of `bench.choice`: ``python -m bench.plot RESULT.json``.

One picture for each recipe beside the result: TFLOP/s against M for each backend, and below it the
latency at small M, a column for each weight. The automatic choice is the dashed line. Graph replay,
so the figures are the GPU's; the eager ones are in the JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = 64
COLORS = {
    "fbgemm": "#d1495b",
    "mslk": "#8d4a9e",
    "deepgemm": "#edae49",
    "cublaslt": "#3a7ca5",
    "triton": "#2e7d4f",
    "gluon": "#7cb342",
    "torchao": "#8c6d46",
    "bf16": "#888888",
    "automatic": "#000000",
}
Point = dict[str, Any]


def main(path: str) -> None:
    """Write ``RESULT-<recipe>.png`` for each recipe of the result."""
    source = Path(path)
    result = json.loads(source.read_text("utf-8"))
    machine = result["machine"]
    for recipe in dict.fromkeys(point["recipe"] for point in result["choice"]):
        points = [point for point in result["choice"] if point["recipe"] == recipe]
        weights = list(dict.fromkeys((point["n"], point["k"]) for point in points))
        figure, axes = plt.subplots(
            2, len(weights), figsize=(3.1 * len(weights), 6.4), squeeze=False, layout="constrained"
        )
        for column, (n, k) in enumerate(weights):
            here = [point for point in points if (point["n"], point["k"]) == (n, k)]
            _draw(axes[0][column], [p for p in here if p["m"] >= SMALL], _tflops)
            _draw(axes[1][column], [p for p in here if p["m"] <= SMALL], _microseconds)
            axes[0][column].set_title(f"N={n} K={k}", fontsize=9)
            axes[1][column].set_xlabel("M")
        axes[0][0].set_ylabel("TFLOP/s, whole linear")
        axes[1][0].set_ylabel("microseconds, whole linear")
        handles = {}
        for axis in axes.flat:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles)
        )
        versions = machine["versions"]
        figure.suptitle(
            f"fp8_linear, {recipe}, bf16 in and out, CUDA graph, L2 flushed: "
            f"{machine.get('gpu', '')}, torch {versions['torch']}, {machine['date']}",
            fontsize=10,
        )
        out = source.with_name(f"{source.stem}-{recipe.replace(' ', '-')}.png")
        figure.savefig(out, dpi=110)
        plt.close(figure)
        print(f"wrote {out}")


def _tflops(point: Point, us: float) -> float:
    return float(2 * point["m"] * point["n"] * point["k"] / us / 1e6)


def _microseconds(point: Point, us: float) -> float:
    return us


def _draw(axis: Axes, points: Sequence[Point], value: Any) -> None:
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for point in points:
        for name, us in {**point["graph"]["us"], "bf16": point["bf16_us"]}.items():
            xs, ys = lines.setdefault(name, ([], []))
            xs.append(point["m"])
            ys.append(value(point, us))
    for name, (xs, ys) in lines.items():
        automatic = name == "automatic"
        axis.plot(
            xs,
            ys,
            label=name,
            color=COLORS.get(name),
            marker=None if automatic else "o",
            markersize=3,
            linewidth=1.2,
            linestyle="--" if automatic else "-",
            zorder=3 if automatic else 2,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks([point["m"] for point in points], [str(point["m"]) for point in points])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=7)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.plot RESULT.json")
    main(sys.argv[1])
