"""Pictures of planted results: what is drawn, where the roof is, and that colours tell apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import plot
from bench.plot import Line, Roof
from tests.bench.results import CEILINGS, MACHINE, WEIGHTS, figures, linear_row, result

ROWS = (1, 16, 64, 256, 4096)
US = {"gluon": 8.0, "deepgemm": 9.0, "bf16": 16.0, "automatic": 8.0}


def linear() -> dict[str, Any]:
    rows = [
        linear_row(m, n, k, US, recipe)
        for recipe in ("block 128x128", "row")
        for n, k in WEIGHTS
        for m in ROWS
    ]
    return result("linear", [CEILINGS, *rows])


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_each_recipe_has_three_pictures(tmp_path: Path) -> None:
    drawn = plot.draw(write(tmp_path / "h200-linear.json", linear()))

    kinds = ("tflops", "latency", "speedup")
    assert [path.name for path in drawn] == [
        f"h200-linear-{recipe}-{kind}.png" for recipe in ("block-128x128", "row") for kind in kinds
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_decode_and_gemm_are_drawn_too(tmp_path: Path) -> None:
    n, k = WEIGHTS[0]
    cold = {"cold": figures(US | {"read": 7.0}), "warm": figures(US)}
    decode = [{"recipe": "row", "m": m, "n": n, "k": k, **cold} for m in (1, 2, 4)]
    gemm = [{"recipe": "row", "m": m, "n": n, "k": k, **figures(US)} for m in (256, 512, 1024)]

    for suite, rows in (("decode", decode), ("gemm", gemm)):
        assert plot.main([str(write(tmp_path / f"{suite}.json", result(suite, rows)))]) == 0
    assert (tmp_path / "decode-row-latency.png").exists()
    assert (tmp_path / "gemm-row-tflops.png").exists()
    assert not (tmp_path / "gemm-row-latency.png").exists()


def test_a_line_needs_three_points_and_failures_are_left_out(tmp_path: Path) -> None:
    n, k = WEIGHTS[0]
    rows: list[dict[str, Any]] = [
        {"recipe": "row", "m": m, "n": n, "k": k, **figures(US)} for m in (256, 512)
    ]
    rows.append({"label": "row 1024", "failed": "RuntimeError: planted"})
    path = write(tmp_path / "gemm.json", result("gemm", rows))

    assert plot.draw(path) == []
    assert plot.main([str(path)]) == 2


def test_the_roof_is_the_lower_of_peak_and_memory() -> None:
    roof = plot.roof_of(linear())
    assert roof == Roof(4.0, 1979.0)
    # One row: 2 operations for each byte of the weight, at 4 TB/s.
    assert roof.tflops(1, 4096, 7168) == pytest.approx(8.0, rel=1e-2)
    assert roof.tflops(8192, 8192, 8192) == 1979.0
    assert roof.seconds_of_memory(1, 4000, 1000) == pytest.approx((4e6 + 1e3 + 8e3) / 4e12)
    unknown = plot.roof_of({**linear(), "machine": {**MACHINE, "gpu": "another"}})
    assert unknown.tflops(1 << 20, 8192, 8192) is not None
    assert Roof(None, None).tflops(1, 1, 1) is None


def test_what_is_drawn_of_a_row() -> None:
    line = Line(64, 4096, 7168, {"gluon": 8.0, "bf16": 16.0, "read": 7.0})
    tflops, latency, speedup = (plot.PICTURES[name] for name in ("tflops", "latency", "speedup"))

    assert tflops.value(line, "gluon") == pytest.approx(2 * 64 * 4096 * 7168 / 8e-6 / 1e12)
    assert tflops.value(line, "read") is None
    assert (latency.value(line, "gluon"), latency.value(line, "bf16")) == (8.0, None)
    assert (speedup.value(line, "gluon"), speedup.value(line, "bf16")) == (2.0, None)
    assert latency.takes(line) and not latency.takes(line._replace(m=256))


def test_no_two_arms_look_alike() -> None:
    from fp8dispatch import registry

    assert len(set(plot.STYLES.values())) == len(plot.STYLES)
    # Okabe and Ito's palette, with black and grey.
    palette = "#000000 #777777 #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7"
    assert {color for color, _ in plot.STYLES.values()} <= set(palette.split())
    # MSLK and its tiles are FBGEMM's kernels in another package, never in the same process.
    # CUTLASS has no linear layer.
    assert set(registry.NAMES) - set(plot.STYLES) <= {"mslk_tile", "cutlass"}
