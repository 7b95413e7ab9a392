"""What the results from a GPU say, as the README has it; the words are in `bench.claims`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from bench.ratios import Ratio, Row, collect
from bench.rounding import WORDS, Read, rounded
from bench.shapes import DECODE
from bench.targets import BLOCK, BLOCK_PEERS, LARGE_BYTES
from tests import matrix

STEPS_APART = ("apart", "apart, compiled")


def libraries(read: Read) -> tuple[object, ...]:
    text = read("h200-suite.txt")
    names = ("fbgemm-gpu-genai", "sgl-deep-gemm", "torchao")
    found = [re.search(rf"{name} (\d[\w.]*)", text) for name in names]
    assert all(found), f"h200-suite.txt does not name all of {', '.join(names)}"
    return tuple(match[1] for match in found if match is not None)


def machine(read: Read) -> tuple[object, ...]:
    demo = read("h200-demo.json")
    torch, triton = demo["versions"]["torch"], demo["versions"]["triton"]
    measured = "linear", "decode", "quantise", "gradient", "experts", "experts_layer"
    for name in ("gemm", "host", "numerics", "coldstart", *measured):
        machine = read(f"h200-{name}.json")["machine"]
        assert machine["gpu"] == demo["machine"]["device"] == "NVIDIA H200", name
        assert machine["versions"]["torch"] == torch.split("+")[0], name
        assert machine["versions"]["triton"] == triton, name
    driver = read("h200-gemm.json")["machine"]["driver, power limit"].split(",")[0]
    return driver, torch, triton


def numerics(read: Read) -> tuple[object, ...]:
    rows = read("h200-numerics.json")["numerics"]

    def worst(dtype: str) -> str:
        return rounded(min(row["sqnr_db"] for row in rows if row["out_dtype"] == dtype), 1)

    return (
        sum(row["calls"] for row in rows),
        *(WORDS[len({row[name] for row in rows})] for name in ("backend", "recipe", "out_dtype")),
        min(matrix.ROWS),
        max(m for m, _, _ in matrix.LARGE),
        max(k for _, _, k in matrix.LARGE),
        *(worst(dtype) for dtype in ("bfloat16", "float16", "float32")),
        rounded(min(row["grad_sqnr_db"] for row in rows), 1),
    )


def suite_is_green(read: Read) -> bool:
    """The newest run of the suite, which stands first, had no failures."""
    return not _suite_runs(read)[0][0]


def _suite_runs(read: Read) -> list[tuple[str, str]]:
    """(failed or nothing, passed) of each run."""
    text = read("h200-suite.txt")
    runs = re.findall(r"^(?:(\d+) failed, )?(\d+) passed", text, re.MULTILINE)
    assert runs, "h200-suite.txt names no tests that passed"
    return [(failed, passed) for failed, passed in runs]


def suite(read: Read) -> tuple[object, ...]:
    """Of the newest run, and the one behind it of what had failed."""
    (failed, passed), *later = _suite_runs(read)
    assert later and not later[0][0], "h200-suite.txt has failures that no later run mended"
    return int(failed) + int(passed), passed, failed


def sanitizer(read: Read) -> tuple[object, ...]:
    for name in ("h200-sanitizer.txt", "h200-sanitizer-gluon.txt"):
        found = re.findall(r"ERROR SUMMARY: (\d+) errors", read(name))
        assert found and set(found) == {"0"}, f"{name} has summaries {found}"
    return ()


def demo(read: Read) -> tuple[object, ...]:
    recipes = read("h200-demo.json")["recipes"]
    lowest = min(row["worst_cosine"] for row in recipes)
    shares = [row["bytes_after"] / row["bytes_before"] for row in recipes]
    assert all(0.495 < share < 0.51 for share in shares), f"shares of the bytes: {shares}"
    return f"{int(lowest * 1000) / 1000:.3f}", "half"


def host(read: Read) -> tuple[object, ...]:
    rows = {
        row["backend"]: row["us"]
        for row in read("h200-host.json")["host"]
        if "us" in row and row["recipe"] == BLOCK
    }
    chosen = [rows[name] for name in ("gluon", "triton", "cublaslt")]
    figures = [us[part] for us in chosen for part in ("fp8_linear", "entry")]
    plain = sum(us["bf16"] for us in chosen) / len(chosen)
    return tuple(rounded(value) for value in (*figures, plain))


def coldstart(read: Read) -> tuple[object, ...]:
    rows = {row["recipe"]: row for row in read("h200-coldstart.json")["first result, seconds"]}
    stages = ("nothing stored", "verdicts stored", "all stored")
    first = [
        rounded(rows[recipe][stage]["first call"], 1)
        for stage in (stages[0], stages[2])
        for recipe in ("block", "row")
    ]
    imports = [row[stage]["import torch"] for row in rows.values() for stage in stages]
    return (
        *first,
        rounded(min(imports), 1),
        rounded(max(imports), 1),
        *(rounded(rows[recipe]["prepared bytes"] / 1024) for recipe in ("block", "row")),
        rounded(rows["block"]["weight bytes"] / 1e6),
    )


def gemm(row: dict[str, Any]) -> tuple[object, ...]:
    names = ("gluon", "deepgemm", "cublaslt", "triton")
    return (row["m"], row["n"], row["k"], *(row["tflops"][name] for name in (*names, "bf16")))


def _rows(read: Read, suite: str, recipe: str = BLOCK) -> list[Row]:
    """Timed rows of a suite, with exact accumulation."""
    return [
        row
        for row in read(f"h200-{suite}.json")[suite]
        if row.get("recipe") == recipe and row.get("accuracy", "exact") == "exact"
    ]


def _flat(row: Row) -> Row:
    return row


def _mean(ratios: Sequence[Ratio]) -> str:
    return rounded(statistics.geometric_mean(one.value for one in ratios), 2)


def _worst(ratios: Sequence[Ratio]) -> str:
    return rounded(min(one.value for one in ratios), 2)


def gemm_means(read: Read) -> tuple[object, ...]:
    rows = [row for row in _rows(read, "gemm") if row["m"] >= 256]
    deep = collect(rows, _flat, "gluon", ("deepgemm",))
    usual = [one for one in deep if one.value < 2]
    assert len(usual) == len(deep) - 1
    return (
        len(deep),
        _mean(deep),
        _mean(usual),
        rounded(max(one.value for one in deep), 1),
        _worst(deep),
        _mean(collect(rows, _flat, "gluon", ("cublaslt",))),
    )


def linear(read: Read) -> tuple[object, ...]:
    def eager(row: Row) -> Row:
        return dict(row["eager"])

    blocks = [row for row in _rows(read, "linear") if "eager" in row]
    few, many = (
        collect(
            [row for row in blocks if (row["m"] <= 64) is small and (small or row["m"] >= 256)],
            eager,
            "automatic",
            ("fbgemm_tile", "torchao", "deepgemm", "bf16"),
        )
        for small in (True, False)
    )
    by_row = [row for row in _rows(read, "linear", "row") if "eager" in row]
    per_row = collect(by_row, eager, "automatic", ("fbgemm", "cublaslt"))
    judged = [row for row in (*blocks, *by_row) if "loss" in row["eager"]]
    late = [sum(row[kind]["late"] for row in judged) for kind in ("eager", "graph")]
    return (
        _mean(few),
        len(few),
        _mean(many),
        len(many),
        _worst(many),
        _mean(per_row),
        len(per_row),
        _worst(per_row),
        late[0],
        len(judged),
        late[1],
    )


def decode(read: Read) -> tuple[object, ...]:
    def cold(row: Row) -> Row:
        return dict(row.get("cold", {}))

    shapes = {(weight.n, weight.k) for weight in DECODE}
    rows = [row for row in _rows(read, "decode") if (row["n"], row["k"]) in shapes]
    few = [row for row in rows if row["m"] <= 16]
    many = [row for row in rows if row["m"] in (32, 64)]
    large = [row for row in few if row["n"] * row["k"] > LARGE_BYTES]
    return (
        _mean(collect(few, cold, "gluon", BLOCK_PEERS)),
        _worst(collect(large, cold, "gluon", ("read",))),
        _mean(collect(many, cold, "gluon", ("deepgemm",))),
    )


def quantise(read: Read) -> tuple[object, ...]:
    rows = read("h200-quantise.json")["quantise"]
    plain = next(r["us"] for r in rows if (r["part"], r["m"], r["k"]) == ("plain", 8192, 8192))
    fused = (
        collect([row for row in rows if row["part"] == part], _flat, "fused", STEPS_APART)
        for part in ("rms_norm", "silu_mul")
    )
    return (
        rounded(plain["group 128"], 1),
        rounded(plain["copy"], 1),
        *(_mean(ratios) for ratios in fused),
    )


def gradient(read: Read) -> tuple[object, ...]:
    rows = read("h200-gradient.json")["gradient"]
    found: list[str] = []
    for m in (16, 256, 1024, 4096):
        of_m = [row for row in rows if row["m"] == m]
        ratios = [one.value for one in collect(of_m, _flat, itemgetter("chosen"), ("bf16",))]
        found += [rounded(min(ratios), 1), rounded(max(ratios), 1)]
    return tuple(found)


def experts(read: Read) -> tuple[object, ...]:
    row = next(
        row
        for row in read("h200-experts.json")["experts"]
        if (row["way"], row["rows"], row["n"], row["k"]) == ("grouped", 8192, 4096, 7168)
    )
    names = ("gluon", "triton", "deepgemm", "fbgemm", "bf16")
    layers = {
        row["tokens"]: row["device"]["us"]
        for row in read("h200-experts_layer.json")["experts_layer"]
        if row["model"] == "deepseek-v3"
    }
    ours = [min(layers[tokens][way] for way in ("batched", "grouped")) for tokens in (16, 4096)]
    theirs = [layers[tokens]["bf16"] for tokens in (16, 4096)]
    return (
        row["experts"],
        *(rounded(row["us"][name]) for name in names),
        *(rounded(us / 1e3, 1) for us in (*ours, *theirs)),
    )
