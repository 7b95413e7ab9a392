"""Our Gluon kernels against DeepGEMM and cuBLASLt on Hopper: ``python -m bench.hopper OUT.json``.

Block scales (128x128), bf16 output, through this library's own backends; four parts, each in child
processes with a time limit, since a kernel that hangs cannot be stopped from within:

* ``safety``: every kind of our kernels computes right numbers, one child each, side by side; what
  fails or hangs here is left out of the rest. The kernels of the other parts, DeepGEMM's among
  them, are compiled meanwhile, a child for each weight.
* ``gemm``: the multiplication alone as a CUDA graph, L2 flushed before each timing, M >= 256: our
  choice and every kind that fits, by name.
* ``decode``: M <= 64, weights never in L2: a graph of launches that walks over copies of the weight
  of more than 300 MB together; microseconds for each launch.
* ``linear``: bf16 in, bf16 out, in eager: a single call with L2 flushed, and calls back to back on
  the wall clock, where Python may be what binds.

Arms alternate within each round, data is normally distributed, an arm is timed on a shape only
after it computed it right, and figures are medians over rounds. A part that meets its time limit
keeps what it has. The parts take under four minutes together.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.testing import do_bench

import fp8dispatch
from bench import environment
from bench.gemm import capture
from fp8dispatch import registry
from fp8dispatch.backends.contract import Weight
from fp8dispatch.kernels.hopper_config import (
    HopperConfig,
    choose_config,
    decode_config,
    gemm_config,
)
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.probes.device import describe
from fp8dispatch.problem import LinearProblem
from fp8dispatch.quantization.activation import quantize_activation
from fp8dispatch.recipe import BLOCK_128
from tests import oracle

WEIGHTS = (
    (7168, 2048),
    (4096, 7168),
    (24576, 1536),
    (7168, 16384),
    (8192, 8192),
    (57344, 8192),
)
GEMM_ROWS = (256, 1024, 4096, 8192)
DECODE_ROWS = (1, 16, 32, 64)
LINEAR_ROWS = (1, 16, 64, 256, 1024, 4096)
PEERS = ("deepgemm", "cublaslt")
COLD_BYTES = 300_000_000
ROUNDS = 3
SECONDS = {"safety": 70, "gemm": 75, "decode": 50, "linear": 35}
_GRACE = 25  # a child's imports, and its last row

SAFETY = ("wide", "square", "split", "split3", "split4", "decode", "decode_tall", "decode_split")


class Arms:
    """The operands of one shape, and what multiplies them."""

    def __init__(self, m: int, n: int, k: int, copies: int = 1) -> None:
        self.m, self.n, self.k = m, n, k
        self.x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        self.dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        data, scale = fp8dispatch.quantize(self.dense, BLOCK_128)
        self.weights = [self._weight(data, scale)]
        self.weights += [self._weight(data.clone(), scale.clone()) for _ in range(copies - 1)]
        self.problem = LinearProblem(
            m, n, k, BLOCK_128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16"
        )
        # Rows padded to 4, as DeepGEMM and cuBLASLt want them: no arm copies its operands.
        self.quantized = quantize_activation(self.x, 128, torch.float8_e4m3fn, pad_rows_to=4)
        rows = min(m, 128)
        self.expected = oracle.truth(
            oracle.dequantized_activations(self.x[:rows], BLOCK_128),
            oracle.dequantized_weight(data, scale, BLOCK_128),
        )

    def _weight(self, data: torch.Tensor, scale: torch.Tensor) -> Weight:
        return Weight(
            data, weight_scale_fp32(scale, BLOCK_128, *data.shape), BLOCK_128, scale_source=scale
        )

    def backend(self, name: str, copy: int = 0) -> Callable[[], torch.Tensor]:
        one = registry.load(name)
        return lambda: one.matmul(self.quantized, self.weights[copy], None, self.problem)

    def kind(self, config: HopperConfig, copy: int = 0) -> Callable[[], torch.Tensor]:
        ours = registry.load("gluon")
        return lambda: ours.multiply(  # type: ignore[attr-defined]
            self.quantized, self.weights[copy], None, self.problem, config
        )

    def linear(self, name: str) -> Callable[[], torch.Tensor]:
        if name == "bf16":
            return lambda: torch.nn.functional.linear(self.x, self.dense)
        one = registry.load(name)
        return lambda: one.linear(self.x, self.weights[0], None, None, self.problem)

    def check(self, label: str, out: torch.Tensor) -> None:
        oracle.assert_matches(out[: len(self.expected.value)], self.expected, label=label)

    def peers(self) -> list[str]:
        """The libraries that take this shape here."""
        machine = describe(torch.device("cuda", 0))
        names = []
        for name in PEERS:
            one = registry.load(name)
            if not (
                one.refuse_machine(machine)
                or one.refuse_problem(self.problem, machine)
                or one.loadable(BLOCK_128)
            ):
                names.append(name)
        return names


def kinds_for(m: int, n: int, k: int) -> dict[str, HopperConfig]:
    """Our kernels that fit a shape, by name, without the choice among them."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    if m > 64:
        found = {"wide": gemm_config("wide", m, k), "square": gemm_config("square", m, k)}
        for parts in (2, 3, 4):
            config = gemm_config("split", m, k, split=parts)
            if config.tiles(m, n) * parts <= sms:
                found["split" if parts == 2 else f"split{parts}"] = config
        return found
    base = decode_config(m, n, k, sms)
    found = {"decode": base}
    if base.block_n == 64 and m > 16:
        chunk = min(base.chunk, 2)
        stages = min(base.stages, 8) // chunk * chunk
        found["decode_tall"] = base._replace(block_n=128, chunk=chunk, stages=stages)
    if n < 8192:
        split = base.split * 2
        share = -(-(-(-k // 128) // split) // base.chunk) * base.chunk
        found["decode_split"] = base._replace(split=split, stages=min(base.stages, share))
    return found


def safety(kind: str) -> Iterator[dict[str, Any]]:
    """One kind on a few shapes, or everything once on one weight, so that it is compiled."""
    if kind.startswith("warm"):
        n, k = (int(number) for number in kind.split(":")[1].split("x"))
        for m in (*GEMM_ROWS, *DECODE_ROWS):
            arms = Arms(m, n, k)
            for config in kinds_for(m, n, k).values():
                arms.kind(config)()
            for name in arms.peers():
                arms.backend(name)()
            torch.cuda.synchronize()
        return
    decode = kind.startswith("decode")
    shapes = [(16, 4096, 7168), (64, 4096, 7168), (5, 1000, 1040)]
    for m, n, k in shapes if decode else [(256, 4096, 7168), (130, 264, 1040), (2100, 4096, 2048)]:
        config = kinds_for(m, n, k).get(kind)
        if config is None:
            continue
        arms = Arms(m, n, k)
        first = arms.kind(config)()
        torch.cuda.synchronize()
        arms.check(kind, first)
        for _ in range(50):
            again = arms.kind(config)()
        assert torch.equal(again, first), f"{kind} does not repeat bit for bit"
    yield {"kind": kind, "right": True}


def gemm(allowed: list[str]) -> Iterator[dict[str, Any]]:
    """The multiplication alone, M >= 256."""
    for n, k in WEIGHTS:
        for m in GEMM_ROWS:
            arms = Arms(m, n, k)
            sms = torch.cuda.get_device_properties(0).multi_processor_count
            choice = choose_config(m, n, k, False, sms)
            calls = {name: arms.backend(name) for name in arms.peers()}
            for name, config in kinds_for(m, n, k).items():
                if name in allowed:
                    calls[name] = arms.kind(config)
            for name, call in calls.items():
                arms.check(f"{name} {m}x{n}x{k}", call())
            graphs = {name: capture(call) for name, call in calls.items()}
            us = _alternate(
                {name: graph.replay for name, graph in graphs.items()},
                lambda run: do_bench(run, warmup=4, rep=16, return_mode="median") * 1e3,
            )
            ours = choice.kind if choice.split <= 2 else f"split{choice.split}"
            yield _row(m, n, k, ours, us)


def decode(allowed: list[str]) -> Iterator[dict[str, Any]]:
    """The multiplication alone, M <= 64, each launch over a weight that is not in L2."""
    for n, k in WEIGHTS:
        copies = max(2, math.ceil(COLD_BYTES / (n * k)))
        for m in DECODE_ROWS:
            arms = Arms(m, n, k, copies)
            makers: dict[str, Callable[[int], Callable[[], torch.Tensor]]] = {}
            for name in arms.peers():
                makers[name] = functools.partial(arms.backend, name)
            for name, config in kinds_for(m, n, k).items():
                if name in allowed:
                    makers[name] = functools.partial(arms.kind, config)
            graphs = {}
            for name, make in makers.items():
                arms.check(f"{name} {m}x{n}x{k}", make(0)())
                calls = [make(copy) for copy in range(copies)]
                graphs[name] = capture(lambda calls=calls: [call() for call in calls][-1])
            us = _alternate(
                {name: graph.replay for name, graph in graphs.items()}, _replay_us, rounds=7
            )
            us = {name: value / copies for name, value in us.items()}
            yield _row(m, n, k, "decode", us)


def linear(allowed: list[str]) -> Iterator[dict[str, Any]]:
    """The whole linear in eager: one call with L2 flushed, and calls back to back."""
    for n, k in WEIGHTS:
        for m in LINEAR_ROWS:
            arms = Arms(m, n, k)
            ours = choose_config(m, n, k, False, 132)
            name_of = ours.kind if ours.split <= 2 else f"split{ours.split}"
            names = [*arms.peers(), "bf16"]
            if name_of in allowed or (ours.kind == "decode" and "decode" in allowed):
                names.append("gluon")
            calls = {name: arms.linear(name) for name in names}
            for name, call in calls.items():
                if name != "bf16":
                    arms.check(f"{name} {m}x{n}x{k}", call())
            with torch.inference_mode():
                us = _alternate(
                    calls, lambda run: do_bench(run, warmup=2, rep=8, return_mode="median") * 1e3
                )
                row = _row(m, n, k, "gluon", us)
                if m <= 256:
                    back = _alternate(calls, _back_to_back_us)
                    row["back_to_back_us"] = {name: round(v, 2) for name, v in back.items()}
            yield row


def _alternate(
    arms: dict[str, Callable[[], Any]],
    clock: Callable[[Callable[[], Any]], float],
    rounds: int = ROUNDS,
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        order = list(arms.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            times[name].append(clock(run))
    return {name: statistics.median(values) for name, values in times.items()}


def _replay_us(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _back_to_back_us(run: Callable[[], Any], calls: int = 150) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def _row(m: int, n: int, k: int, ours: str, us: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"m": m, "n": n, "k": k, "ours": ours}
    row["us"] = {name: round(value, 2) for name, value in us.items()}
    if m > 64:
        row["tflops"] = {name: round(2 * m * n * k / value / 1e6) for name, value in us.items()}
    row["clock_mhz"], row["watts"] = torch.cuda.clock_rate(), torch.cuda.power_draw() / 1e3
    return row


def _child(part: str, detail: str, seconds: float) -> None:
    """Print the rows of a part as lines of JSON until it is done or its time is up."""
    deadline = time.monotonic() + seconds
    torch.manual_seed(0)
    rows = safety(detail) if part == "safety" else PARTS[part](detail.split(","))
    for row in rows:
        print(json.dumps(row), flush=True)
        if time.monotonic() > deadline:
            print(json.dumps({"stopped": f"{part} met its limit of {seconds} s"}), flush=True)
            return


def _start(part: str, detail: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.hopper", "--child", part, detail]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(child: subprocess.Popen[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """The rows of a child, and why it ended early (empty when it did not)."""
    try:
        out, err = child.communicate(timeout=max(1.0, seconds))
        told = "" if child.returncode == 0 else f"exit {child.returncode}: {err[-400:]}"
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        told = f"no end within its limit (a hang?): {err[-400:]}"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], told


def main(path: str, parts: list[str]) -> None:
    """Run the safety part and those named, and write the figures."""
    start = time.monotonic()
    warm = [f"warm:{n}x{k}" for n, k in WEIGHTS] if parts else []
    children = {kind: _start("safety", kind) for kind in (*SAFETY, *warm)}
    result: dict[str, Any] = {"safety": {}}
    for kind, child in children.items():
        rows, told = _finish(child, start + SECONDS["safety"] + _GRACE - time.monotonic())
        if kind in SAFETY:
            result["safety"][kind] = told or ("right" if rows else "no shape for it")
        if told:
            print(f"{kind}: {told}", flush=True)
    allowed = [kind for kind, told in result["safety"].items() if told == "right"]
    print(f"safe: {', '.join(allowed)} ({time.monotonic() - start:.0f} s)", flush=True)
    for part in parts:
        rows, told = _finish(_start(part, ",".join(allowed)), SECONDS[part] + _GRACE)
        result[part] = rows
        for row in rows:
            if "us" in row:
                shape = f"{row['m']:5}x{row['n']:5}x{row['k']:5}"
                figures = row.get("tflops", row["us"])
                back = row.get("back_to_back_us", "")
                print(f"{part:7} {shape} {row['ours']:7} {figures} {back}", flush=True)
        if told:
            result[f"{part}_ended"] = told
            print(f"{part}: {told}", flush=True)
        print(f"{part} done ({time.monotonic() - start:.0f} s)", flush=True)
    result["ratios"] = _ratios(result)
    print(json.dumps(result["ratios"], indent=1))
    environment.write(path, result)


def _ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Geometric means of a peer's time over ours, by part."""
    found: dict[str, Any] = {}
    for part in PARTS:
        for peer in (*PEERS, "bf16"):
            values = [
                row["us"][peer] / row["us"][row["ours"]]
                for row in result.get(part, [])
                if "us" in row and peer in row["us"] and row["ours"] in row["us"]
            ]
            if values:
                found[f"{part}, {peer} / ours"] = {
                    "geometric mean": round(statistics.geometric_mean(values), 3),
                    "worst": round(min(values), 3),
                    "points": len(values),
                }
    return found


PARTS: dict[str, Callable[[list[str]], Iterator[dict[str, Any]]]] = {
    "gemm": gemm,
    "decode": decode,
    "linear": linear,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", help="result file")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS), help="after safety; all of them"
    )
    parser.add_argument("--child", nargs=2, metavar=("PART", "DETAIL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*arguments.child, SECONDS[arguments.child[0]])
    elif arguments.out:
        main(arguments.out, arguments.parts)
    else:
        parser.error("a result file is needed")
