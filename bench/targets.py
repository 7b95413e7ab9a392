"""The project's targets, and which are reached: ``python -m bench targets [RESULTS] [PREFIX]``.

Each target says what is compared, the threshold, and the result file that decides it
(``<PREFIX>-<suite>.json`` in RESULTS, by default ``bench/results`` and ``h200``). A target whose
file is not there, or has no point for it, is "not measured". A ratio is always their time over
ours: more than 1 is faster than they are. "Beyond noise" takes half of the spread over the rounds
of both arms as what a repetition may change.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from bench.arms import LIBRARIES
from bench.ratios import Outcome, Row, collect, each_at_least, mean_at_least
from bench.shapes import DECODE
from tests import oracle

RESULTS = Path(__file__).parent / "results"
BLOCK, ROW = "block 128x128", "row"
OURS = ("gluon", "triton")
BLOCK_PEERS = ("deepgemm", "cublaslt", "fbgemm", "mslk", "torchao")
HUB_US = {(8, 4096, 7168, 8192): 1570.0, (8, 7168, 2048, 8192): 856.0}
"""The hub kernel finegrained-fp8, version 1, on another H200 with the same versions; not rerun."""
LARGE_BYTES = 25e6
Result = dict[str, Any]


class Target(NamedTuple):
    """One target.

    Attributes:
        name: in a few words.
        formula: what is computed, in words.
        threshold: what it must come to.
        suite: whose result file decides; with a dot, a log: ``sanitizer.txt``.
        outcome: computes it from the parsed file, of a log from ``{"text": ...}``; None where the
            file has no point for it.
    """

    name: str
    formula: str
    threshold: str
    suite: str
    outcome: Callable[[Result], Outcome | None]


def _rows(result: Result, recipe: str = "", low: int = 0, high: int = 1 << 62) -> list[Row]:
    """Timed rows of the suite, exact accumulation, of a recipe ("" for any), M within bounds."""
    return [
        row
        for row in result[result["suite"]]
        if row.get("part") != "ceilings"
        and "failed" not in row
        and row.get("accuracy", "exact") == "exact"
        and (not recipe or row.get("recipe") == recipe)
        and low <= row.get("m", low) <= high
    ]


def _flat(row: Row) -> Row:
    return row


def _cold(row: Row) -> Row:
    return row.get("cold", {})


def _eager(row: Row) -> Row:
    return row.get("eager", {})


def _gemm(peer: str) -> Callable[[Result], Any]:
    return lambda result: collect(_rows(result, BLOCK, 256), _flat, "gluon", (peer,))


def _decode(low: int, high: int, peers: tuple[str, ...]) -> Callable[[Result], Any]:
    return lambda result: collect(
        [row for row in _rows(result, BLOCK, low, high) if _in_decode(row)], _cold, "gluon", peers
    )


def _in_decode(row: Row) -> bool:
    return (row["n"], row["k"]) in {(weight.n, weight.k) for weight in DECODE}


def _whole(
    recipe: str, low: int, high: int, peers: tuple[str, ...], *, alone: bool = False
) -> Callable[[Result], Any]:
    """The automatic choice, or what it is without the other libraries, against the best peer."""

    def chosen(row: Row) -> str:
        return str(row["chosen without libraries"]) if alone else "automatic"

    return lambda result: collect(_rows(result, recipe, low, high), _eager, chosen, peers)


BLOCK_LINEARS = ("fbgemm_tile", "torchao", "deepgemm", "bf16")
ROW_LINEARS = ("fbgemm", "cublaslt")


def _near_reading(result: Result) -> Outcome | None:
    rows = [row for row in _rows(result, BLOCK, 1, 16) if row["n"] * row["k"] > LARGE_BYTES]
    return each_at_least(collect(rows, _cold, "gluon", ("read",)), 1 / 1.25)


def _host_bound(result: Result) -> Outcome | None:
    rows = [row for row in _rows(result, "", 1, 16) if (row["n"], row["k"]) == (4096, 7168)]
    found = [(row["wall"]["us"], row) for row in rows if "automatic" in row["wall"]["us"]]
    if not found:
        return None
    good = [us["automatic"] <= max(15.0, 0.75 * us["bf16"]) for us, _ in found]
    told = ", ".join(
        f"{row['recipe']} M={row['m']}: {us['automatic']:.1f} (bf16 {us['bf16']:.1f})"
        for us, row in found
    )
    return Outcome(all(good), f"us {told}")


def _quantiser(result: Result) -> Outcome | None:
    rows = [row for row in _rows(result, "", 1024) if row["part"] == "plain"]
    ratios = [
        one for name in ("group 128", "token") for one in collect(rows, _flat, name, ("copy",))
    ]
    return each_at_least(ratios, 0.95)


def _fused(part: str) -> Callable[[Result], Outcome | None]:
    def outcome(result: Result) -> Outcome | None:
        rows = [row for row in _rows(result) if row["part"] == part]
        return mean_at_least(collect(rows, _flat, "fused", ("apart", "apart, compiled")), 1.6)

    return outcome


def _compiled(result: Result) -> Outcome | None:
    ratios = [
        one
        for arm in ("compiled", "replay")
        for one in collect(_rows(result), lambda row: row.get("device", {}), arm, ("eager",))
    ]
    return each_at_least(ratios, 1.0)


def _gradient(result: Result) -> Outcome | None:
    return each_at_least(collect(_rows(result), _flat, itemgetter("chosen"), ("bf16",)), 0.9)


def _numerics(result: Result) -> Outcome | None:
    rows = result["numerics"]
    if not rows:
        return None
    floors = {str(dtype).removeprefix("torch."): db for dtype, db in oracle.MIN_SQNR.items()}
    good = all(
        row["sqnr_db"] >= floors[row["out_dtype"]]
        and row["grad_sqnr_db"] >= oracle.MIN_SQNR_GRAD
        and row["bound_used"] <= 1
        for row in rows
    )
    names = sorted({row["backend"] for row in rows})
    worst = min(row["sqnr_db"] for row in rows if row["out_dtype"] == "bfloat16")
    calls = sum(row["calls"] for row in rows)
    failed = result.get("failed", {})
    text = f"{calls} calls, worst bf16 row {worst} dB, {len(failed)} failed, of {', '.join(names)}"
    return Outcome(good and not failed, text)


def _over_entry(result: Result) -> Outcome | None:
    rows = [row for row in result["host"] if "over_entry_us" in row]
    if not rows:
        return None
    worst = max(rows, key=lambda row: row["over_entry_us"])
    return Outcome(
        worst["over_entry_us"] <= 2.5,
        f"at most {worst['over_entry_us']} us ({worst['backend']}, {worst['recipe']})",
    )


def _never_late(result: Result) -> Outcome | None:
    rows = [row for row in _rows(result) if "loss" in row.get("eager", {})]
    if not rows:
        return None
    late = {kind: sum(row[kind]["late"] for row in rows) for kind in ("eager", "graph")}
    told = ", ".join(f"{count} late {kind}" for kind, count in late.items())
    return Outcome(not any(late.values()), f"{told}, of {len(rows)} points")


def _coldstart(result: Result) -> Outcome | None:
    rows = result["first result, seconds"]
    if not rows:
        return None
    told = "; ".join(
        f"{row['recipe']}: {row['nothing stored']['first call']} s with nothing stored, "
        f"{row['all stored']['first call']} s with all, {row['prepared bytes']} bytes prepared"
        for row in rows
    )
    return Outcome(True, told)


def _experts_numerics(result: Result) -> Outcome | None:
    rows = _rows(result)
    found = {name: one for row in rows for name, one in row["found"].items()}
    if not found:
        return None
    failed = len(result[result["suite"]]) - len(rows) + sum("wrong" in row for row in rows)
    worst = min(one["sqnr_db"] for row in rows for one in row["found"].values())
    text = f"worst row {worst} dB, {failed} points not right, of {', '.join(sorted(found))}"
    return Outcome(worst >= 50 and not failed, text)


def _best_of_ours(row: Row) -> str:
    timed = [name for name in OURS if name in row["us"]]
    return min(timed, key=lambda name: row["us"][name], default="none")


def _prefill(result: Result) -> Outcome | None:
    rows = [row for row in _rows(result) if row["way"] == "grouped"]
    return each_at_least(collect(rows, _flat, _best_of_ours, ("deepgemm",)), 1.0)


def _prefill_hub(result: Result) -> Outcome | None:
    found = []
    for row in _rows(result):
        hub = HUB_US.get((row["experts"], row["n"], row["k"], row["rows"]))
        if row["way"] == "grouped" and hub is not None and _best_of_ours(row) != "none":
            found.append(hub / row["us"][_best_of_ours(row)])
    if not found:
        return None
    return Outcome(min(found) >= 3.3, ", ".join(f"{one:.2f}" for one in found))


def _expert_decode(result: Result) -> Outcome | None:
    rows = [row for row in _rows(result) if row["way"] == "batched"]
    return each_at_least(collect(rows, _flat, _best_of_ours, ("read",)), 1 / 1.4)


def _mean(ratios: Callable[[Result], Any], least: float) -> Callable[[Result], Outcome | None]:
    return lambda result: mean_at_least(ratios(result), least)


def _each(ratios: Callable[[Result], Any], least: float) -> Callable[[Result], Outcome | None]:
    return lambda result: each_at_least(ratios(result), least)


def _log(*good: str, bad: str = "") -> Callable[[Result], Outcome | None]:
    """A log that has a line of each pattern of `good`, and none of `bad`."""

    def outcome(result: Result) -> Outcome:
        text = result["text"]
        found = [re.search(pattern, text) for pattern in good]
        wrong = re.search(bad, text) if bad else None
        told = "; ".join(match[0] for match in (*found, wrong) if match is not None)
        return Outcome(all(found) and wrong is None, told or "none of the lines that it needs")

    return outcome


FEW, MANY, ANY = (1, 64), (256, 1 << 62), (1, 1 << 62)
TARGETS: tuple[Target, ...] = (
    Target("block GEMM against DeepGEMM", "geometric mean, M >= 256", ">= 1.00, aim 1.05",
           "gemm", _mean(_gemm("deepgemm"), 1.0)),
    Target("block GEMM against DeepGEMM", "each point with M >= 256, beyond noise", ">= 0.93",
           "gemm", _each(_gemm("deepgemm"), 0.93)),
    Target("block GEMM against cuBLASLt", "geometric mean, M >= 256", ">= 1.08",
           "gemm", _mean(_gemm("cublaslt"), 1.08)),
    Target("decode against the best block-scaled peer", "cold, geometric mean, M <= 16, five "
           "weights", ">= 1.10", "decode", _mean(_decode(1, 16, BLOCK_PEERS), 1.1)),
    Target("decode against reading", "cold, each point, M <= 16, weights over 25 MB",
           "within 1.25 of the kernel that reads", "decode", _near_reading),
    Target("decode against DeepGEMM", "cold, geometric mean, M = 32 and 64", ">= 0.97, aim 1.0",
           "decode", _mean(_decode(32, 64, ("deepgemm",)), 0.97)),
    Target("whole linear, blocks, few rows", "automatic, eager, against the best of FBGEMM "
           "128x128, TorchAO, DeepGEMM and bf16; geometric mean, M <= 64", ">= 1.4", "linear",
           _mean(_whole(BLOCK, *FEW, BLOCK_LINEARS), 1.4)),
    Target("whole linear, blocks, many rows", "the same, M >= 256", ">= 1.03", "linear",
           _mean(_whole(BLOCK, *MANY, BLOCK_LINEARS), 1.03)),
    Target("whole linear, blocks", "the same, each point, beyond noise", ">= 0.97", "linear",
           _each(_whole(BLOCK, *ANY, BLOCK_LINEARS), 0.97)),
    Target("whole linear, rows", "automatic, eager, against the best of FBGEMM and cuBLASLt behind "
           "a quantiser; geometric mean", ">= 1.05", "linear",
           _mean(_whole(ROW, *ANY, ROW_LINEARS), 1.05)),
    Target("whole linear, rows", "the same, each point, beyond noise", ">= 0.95", "linear",
           _each(_whole(ROW, *ANY, ROW_LINEARS), 0.95)),
    Target("whole linear, blocks, few rows, no other library", f"what is chosen without "
           f"{', '.join(LIBRARIES)}; geometric mean, M <= 64", ">= 1.35", "linear",
           _mean(_whole(BLOCK, *FEW, BLOCK_LINEARS, alone=True), 1.35)),
    Target("whole linear, blocks, many rows, no other library", "the same, M >= 256", ">= 1.0",
           "linear", _mean(_whole(BLOCK, *MANY, BLOCK_LINEARS, alone=True), 1.0)),
    Target("whole linear, rows, no other library", "the same, every M", ">= 1.0", "linear",
           _mean(_whole(ROW, *ANY, ROW_LINEARS, alone=True), 1.0)),
    Target("whole linear, host-bound", "microseconds back to back, 4096x7168, M <= 16",
           "<= 15, or 0.75 of bf16", "linear", _host_bound),
    Target("activation quantisation", "a copy of the same bytes over it, each point from 1024 "
           "rows, beyond noise", ">= 0.95", "quantise", _quantiser),
    Target("RMSNorm fused with quantisation", "the two steps apart (the faster of plain and "
           "compiled) over it, geometric mean", ">= 1.6", "quantise", _fused("rms_norm")),
    Target("SiLU-gating fused with quantisation", "the same", ">= 1.6", "quantise",
           _fused("silu_mul")),
    Target("torch.compile and graph replay", "eager's device time over theirs, each point, beyond "
           "noise", ">= 1.0", "compile", _compiled),
    Target("dX from the FP8 weight", "bf16 dY @ W over what is chosen, each point, beyond noise",
           ">= 0.9", "gradient", _gradient),
    Target("numbers of every backend", "decibels of the worst row of output and dX, the "
           "per-element bound", "the bounds of the tests", "numerics", _numerics),
    Target("host cost of fp8_linear", "microseconds over the backend's own entry point, the worst "
           "backend", "<= 2.5", "host", _over_entry),
    Target("automatic choice", "points that cost over 5 % and over 2 us more than the best "
           "backend", "none", "linear", _never_late),
    Target("cold start", "seconds to the first right result, bytes of prepared layouts",
           "measured", "coldstart", _coldstart),
    Target("numbers of experts", "decibels of the worst row, bf16 out", ">= 50",
           "experts_numerics", _experts_numerics),
    Target("experts, prefill", "DeepGEMM with quantisation and aligned copy over ours, each shape, "
           "beyond noise", ">= 1.0", "experts", _prefill),
    Target("experts, prefill", "the hub kernel over ours, the first two shapes", ">= 3.3",
           "experts", _prefill_hub),
    Target("experts, decode", "against a kernel that reads the distinct experts, each point",
           "within 1.4", "experts", _expert_decode),
    Target("GPU suite", "its summary", "passed, nothing failed", "suite.txt",
           _log(r"\d+ passed.*", bad=r"\d+ (failed|error).*")),
    *(
        Target(f"{tool} of the {kernels} kernels", "compute-sanitizer's summary",
               summary, f"{log}{name}.txt",
               _log(r"numbers right", summary, bad=r"SUMMARY: [1-9].*"))
        for tool, log, summary in (("memcheck", "sanitizer", "ERROR SUMMARY: 0 errors"),
                                   ("racecheck", "racecheck", "RACECHECK SUMMARY: 0 hazards"))
        for kernels, name in (("Triton", ""), ("Hopper", "-gluon"))
    ),
)  # fmt: skip

HELD_BY_TESTS = {
    "bitwise repeatable, NaN-poisoned outputs and workspaces": "tests/gpu/test_gluon.py",
    "simulated decisions of the doctor for twelve machines": "tests/doctor/test_machines.py",
    "two processes, a killed probe, a read-only home, a full disk, a corrupt cache":
        "tests/probes/test_store.py",
    "a whole FP8Experts in a graph whose routing changes": "tests/gpu/test_experts_module.py",
    "bad input to experts": "tests/moe/test_matmul_errors.py",
}  # fmt: skip
"""What no figure says: target -> the tests that hold it."""


def judge(target: Target, results: Path, prefix: str) -> tuple[str, str]:
    """("reached" | "MISSED" | "not measured", the figure or why there is none)."""
    is_log = "." in target.suite
    path = results / f"{prefix}-{target.suite}{'' if is_log else '.json'}"
    if not path.exists():
        return "not measured", f"no {path.name}"
    text = path.read_text("utf-8")
    result = {"text": text} if is_log else json.loads(text)
    if result.get("rehearsal"):
        return "not measured", f"{path.name} is a rehearsal"
    outcome = target.outcome({"suite": target.suite, **result})
    if outcome is None:
        return "not measured", f"{path.name} has no point for it"
    stopped = "; the run was stopped early" if "stopped" in result else ""
    return ("reached" if outcome.reached else "MISSED"), outcome.text + stopped


def main(arguments: list[str]) -> int:
    """Print every target; 0 where none that is measured is missed."""
    if len(arguments) > 2:
        print("usage: python -m bench targets [RESULTS] [PREFIX]")
        return 2
    results = Path(arguments[0]) if arguments else RESULTS
    prefix = arguments[1] if len(arguments) > 1 else "h200"
    counts = {"reached": 0, "MISSED": 0, "not measured": 0}
    for target in TARGETS:
        state, text = judge(target, results, prefix)
        counts[state] += 1
        print(f"{state:12} {target.name}: {target.formula}: {target.threshold}\n{'':13}{text}")
    for what, where in HELD_BY_TESTS.items():
        print(f"{'by tests':12} {what}: {where}")
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts["MISSED"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
