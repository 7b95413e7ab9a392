"""The numbers of the README as data: the words around them, and how a result file gives them.

A claim is a text of the README with a place ``{}`` for each number. `Claim.values` computes them
from result files, rounded as the README has them; `bench.figures` puts them into the text and looks
for it in the README. Whoever writes a number into the README adds its claim here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, NamedTuple

from tests import matrix

Read = Callable[[str], Any]
"""Gives the content of a result file: parsed where it is JSON, else its text."""


class Claim(NamedTuple):
    """Some words of the README.

    Attributes:
        text: with a place for each value.
        values: computes them; raises AssertionError where a file does not support the words.
    """

    text: str
    values: Callable[[Read], tuple[object, ...]]


def rounded(value: float, digits: int = 0) -> str:
    """A number as one rounds by hand, halves up: 2.05 is 2.1."""
    step = Decimal(1).scaleb(-digits)
    return str(Decimal(str(value)).quantize(step, ROUND_HALF_UP))


_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 8: "eight"}


def claims(read: Read) -> Iterator[Claim]:
    """All of them; those of a table are made from its file."""
    yield Claim(
        "On SmolLM2-135M, {} tokens: the largest input of `layers.11.mlp.down_proj` is {} times "
        "the 99.9th percentile; clipping it at the 99.99th percentile makes the layer's output "
        "{} % wrong (the massive token carries it), while with the largest value as the limit the "
        "median token's output is {} % off, and {} % with one scale per token",
        _calibration,
    )
    yield Claim(
        "MiniLM's token states have a cosine of {} to {} to the original's in the {} forms that "
        "Transformers loads, there and here; its {} weights have an SQNR of {} dB or more at every "
        "granularity. SmolLM2-135M, with FP8 weights and activations, loses {} % of perplexity "
        "with 128x128 blocks and {} % with `--keep-ends 2`; with channel scales it loses {} %, "
        "{} % with `--scales mse` and {} % with both; with groups of 32 and both, {} % ({} tokens, "
        "standard error {} to {} %).",
        _pipeline,
    )
    yield Claim("`fbgemm` ({}), `deepgemm` ({}) and `torchao` ({}) have run on an H200", _libraries)
    yield Claim("One H200 (driver {}, torch {}, triton {})", _machine)
    yield Claim(
        "{} calls over these {} backends, {} recipes, {} output dtypes, with and without bias, M "
        "from {} to {}, ragged N and K, K up to {}, against float64 on the same quantised "
        "operands: the worst row of an output has {} dB in bf16, {} dB in fp16 and {} dB in fp32, "
        "the worst row of dX {} dB; every other call was refused with a sentence",
        _numerics,
    )
    yield Claim("The GPU suite passes", _suite)
    yield Claim("compute-sanitizer finds nothing in the Triton kernels", _sanitizer)
    yield Claim("{} random cases on the CPU pass for each of {} seeds", _random_cases)
    yield Claim(
        "every sentence keeps a cosine of at least {} to fp32 in each recipe, with {} the bytes "
        "of bf16",
        _demo,
    )
    yield Claim(
        "a repeated call keeps Python busy for {} to {} microseconds, {} to {} of them in the "
        "backend's own entry point, where bf16 takes about {}",
        _host,
    )
    yield Claim(
        "The first call of a process over a 4096 x 7168 layer takes {} s in blocks and {} s per "
        "row with nothing stored (canaries and the compilation of our kernels included), {} and "
        "{} s once verdicts and kernels are stored; importing torch took {} to {} s before that. "
        "Prepared layouts add {} and {} KB to a weight of {} MB",
        _coldstart,
    )
    for row in read("h200-gemm.json")["gemm"]:
        if row["m"] >= 256:
            yield Claim("| {} x {} x {} | {} | {} | {} | {} |", lambda _, row=row: _gemm(row))
    yield Claim(
        "{} kills at {} random moments: every resumed job gave the bytes of one that was not "
        "killed, and no partial file had a final name",
        _kills,
    )
    yield Claim(
        "Packing block128 with two workers, write and fsync included, took {} GB/s of BF16 "
        "(median of {}; {} GB/s with the report), {} times as fast as a loop over whole tensors "
        "that writes the same bytes; a single tensor of {} GB took at most {} MB of anonymous "
        "memory over the bare interpreter with torch",
        _pack,
    )


def _calibration(read: Read) -> tuple[object, ...]:
    result = read("cpu-calibration.json")
    layer = "model.layers.11.mlp.down_proj"
    watch = next(row for row in result["saturation"] if row["name"] == layer)
    errors = result["output_errors"][layer]
    return (
        result["tokens"],
        rounded(watch["ratio"]),
        rounded(100 * errors["percentile"]["total"]),
        rounded(100 * errors["max"]["median_token"], 1),
        rounded(100 * errors["dynamic"]["median_token"], 1),
    )


def _pipeline(read: Read) -> tuple[object, ...]:
    rows = read("cpu-pipeline.json")["pipeline"]
    forms = [row for row in rows.values() if "cosine of tokens here" in row]
    cosines = [
        row[f"cosine of tokens {where}"] for row in forms for where in ("here", "in transformers")
    ]
    ratios = [row for name, row in rows.items() if name.startswith("MiniLM, SQNR")]
    mse, both = "--scales mse", "--scales mse --keep-ends 2"
    packed = (
        "block128",
        "block128, --keep-ends 2",
        "channel",
        f"channel, {mse}",
        f"channel, {both}",
        f"group32, {both}",
    )
    small = [rows[f"SmolLM2-135M, {how}"] for how in packed]
    errors = [row["standard error"] for row in small]
    return (
        rounded(min(cosines), 4),
        rounded(max(cosines), 4),
        _WORDS[len(forms)],
        *{row["modules"] for row in ratios},
        rounded(min(row["worst SQNR, dB"] for row in ratios), 1),
        *(rounded(100 * (row["ratio"] - 1), 1) for row in small),
        *{row["tokens"] for row in small},
        rounded(100 * min(errors), 1),
        rounded(100 * max(errors), 1),
    )


def _libraries(read: Read) -> tuple[object, ...]:
    text = read("h200-suite.txt")
    names = ("fbgemm-gpu-genai", "sgl-deep-gemm", "torchao")
    found = [re.search(rf"{name} (\d[\w.]*)", text) for name in names]
    assert all(found), f"h200-suite.txt does not name all of {', '.join(names)}"
    return tuple(match[1] for match in found if match is not None)


def _machine(read: Read) -> tuple[object, ...]:
    demo = read("h200-demo.json")
    torch, triton = demo["versions"]["torch"], demo["versions"]["triton"]
    for name in ("gemm", "host", "numerics", "coldstart"):
        machine = read(f"h200-{name}.json")["machine"]
        assert machine["gpu"] == demo["machine"]["device"] == "NVIDIA H200", name
        assert machine["versions"]["torch"] == torch.split("+")[0], name
        assert machine["versions"]["triton"] == triton, name
    driver = read("h200-gemm.json")["machine"]["driver, power limit"].split(",")[0]
    return driver, torch, triton


def _numerics(read: Read) -> tuple[object, ...]:
    rows = read("h200-numerics.json")["numerics"]

    def worst(dtype: str) -> str:
        return rounded(min(row["sqnr_db"] for row in rows if row["out_dtype"] == dtype), 1)

    return (
        sum(row["calls"] for row in rows),
        *(_WORDS[len({row[name] for row in rows})] for name in ("backend", "recipe", "out_dtype")),
        min(matrix.ROWS),
        max(m for m, _, _ in matrix.LARGE),
        max(k for _, _, k in matrix.LARGE),
        *(worst(dtype) for dtype in ("bfloat16", "float16", "float32")),
        rounded(min(row["grad_sqnr_db"] for row in rows), 1),
    )


def _suite(read: Read) -> tuple[object, ...]:
    text = read("h200-suite.txt")
    assert re.search(r"\d+ passed", text), "h200-suite.txt names no tests that passed"
    assert not re.search(r"\d+ (failed|error)", text), "h200-suite.txt has failures"
    return ()


def _sanitizer(read: Read) -> tuple[object, ...]:
    found = re.findall(r"ERROR SUMMARY: (\d+) errors", read("h200-sanitizer.txt"))
    assert found and set(found) == {"0"}, f"h200-sanitizer.txt has summaries {found}"
    return ()


def _random_cases(read: Read) -> tuple[object, ...]:
    found = re.findall(r"(\d+) passing, (\d+) failing", read("cpu-hypothesis.txt"))
    assert len({passing for passing, _ in found}) == 1, f"runs differ: {found}"
    assert {failing for _, failing in found} == {"0"}, f"cases fail: {found}"
    return f"{int(found[0][0]):,}", _WORDS[len(found)]


def _demo(read: Read) -> tuple[object, ...]:
    recipes = read("h200-demo.json")["recipes"]
    lowest = min(row["worst_cosine"] for row in recipes)
    shares = [row["bytes_after"] / row["bytes_before"] for row in recipes]
    assert all(0.495 < share < 0.51 for share in shares), f"shares of the bytes: {shares}"
    return f"{int(lowest * 1000) / 1000:.3f}", "half"


def _host(read: Read) -> tuple[object, ...]:
    rows = [row["us"] for row in read("h200-host.json")["host"] if "us" in row]
    through = [us["fp8_linear"] for us in rows]
    entry = [us["entry"] for us in rows]
    plain = sum(us["bf16"] for us in rows) / len(rows)
    limits = (min(through), max(through), min(entry), max(entry), plain)
    return tuple(rounded(value) for value in limits)


def _coldstart(read: Read) -> tuple[object, ...]:
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


def _gemm(row: dict[str, Any]) -> tuple[object, ...]:
    """Of a row as this library's files have it: by arm, or arms by figure."""
    tflops = row["tflops"] if "tflops" in row else {
        name: row[name]["tflops"] for name in ("triton", "cublaslt", "bf16")
    }  # fmt: skip
    shape = (row["m"], row["n"], row["k"], row["recipe"])
    return (*shape, *(tflops[name] for name in ("triton", "cublaslt", "bf16")))


def _kills(read: Read) -> tuple[object, ...]:
    result = read("cpu-pack-kills.json")
    assert result["all identical, no partial file"], "a job that was killed differs"
    return result["kills"], result["points"]


def _pack(read: Read) -> tuple[object, ...]:
    result = read("cpu-pack.json")
    speed, space = result["throughput"], result["memory"]
    assert speed["same bytes as the loop"], "the bytes are not the loop's"
    runs = len(speed["rates"]["2 workers, no report"]["runs"])
    highest = max(space[name]["peak over bare MB"] for name in ("with report", "without report"))
    return (
        rounded(speed["no report"], 2),
        _WORDS[runs],
        rounded(speed["report"], 2),
        rounded(speed["times the loop"], 1),
        rounded(space["tensor GB"], 1),
        rounded(highest),
    )
