"""How fast packing is, and in how much memory: ``python -m bench.pack OUT.json``.

Needs 12 GB of free disk under the folder for temporary files, and no GPU. The source is in the
page cache; every run ends with fsync. A run waits a while for a quiet machine, and the result says
how much others used it. Exits 1 when a figure misses its aim.

* throughput: block128 of a model of 1.7 GB in BF16, with 1, 2 and 4 workers, and with the report,
  beside a loop over whole tensors in plain torch that writes the same bytes; the runs of
  all variants alternate, and the medians are compared.
* memory: a single tensor of 4 GB, in a fresh process that samples its anonymous memory.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench import environment
from fp8dispatch.pack.header import TensorSpec
from fp8dispatch.pack.options import PackOptions
from fp8dispatch.pack.packing import pack_checkpoint
from fp8dispatch.pack.writer import ShardWriter

REPEATS = 5
PATIENCE, QUIET = 5, 0.15
"""Seconds to wait for a quiet machine before a run, and the share of it that others may use."""
AIM = {"no report": 1.0, "report": 0.6, "times the loop": 3.0, "anonymous MB": 600.0}
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)]
OPTIONS = PackOptions(recipe="block128")
LARGE = (262144, 8192)  # 4 GiB in BF16
FILE = "model.safetensors"


def make_model(folder: Path, shapes: list[tuple[int, int]]) -> Path:
    """A model of BF16 weights of these shapes, random."""
    folder.mkdir(parents=True)
    specs = [
        TensorSpec(f"model.layers.{number}.mlp.up_proj.weight", "BF16", shape)
        for number, shape in enumerate(shapes)
    ]
    writer = ShardWriter(folder / FILE, specs, {"format": "pt"})
    rows = 1024
    for number, spec in enumerate(specs):
        torch.manual_seed(number)
        strip = (torch.randn(rows, spec.shape[1]) * 0.02).bfloat16()
        for start in range(0, spec.shape[0], rows):
            # Rolled, so that no strip repeats the blocks of another.
            part = strip.roll(start // rows, 1)[: spec.shape[0] - start].contiguous()
            writer.write(spec.name, part, start * spec.shape[1])
    writer.check_complete()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    os.sync()
    return folder


def whole_tensor_loop(source: Path, out: Path) -> None:
    """What a script does: each tensor at once, everything in memory, then one file."""
    out.mkdir()
    tensors = {}
    with safe_open(source / FILE, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (a file, not a dict)
            weight = file.get_tensor(name).float()
            n, k = weight.shape
            blocks = weight.view(n // 128, 128, k // 128, 128)
            amax = blocks.abs().amax(dim=(1, 3))
            scale = torch.where(amax == 0, 1.0, amax.clamp(min=1e-12) / 448)
            data = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[name] = data.view(n, k)
            tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, out / FILE, metadata={"format": "pt"})
    with (out / FILE).open("rb+") as file:
        os.fsync(file.fileno())


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used."""
    fields = [int(one) for one in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # idle, iowait


def wait_until_quiet() -> None:
    """Until others leave most of this machine alone for a second; at most `PATIENCE` seconds."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(1)
        if busy_seconds() - before < QUIET * len(os.sched_getaffinity(0)):
            return


def timed(work: Callable[[Path], object], out: Path) -> tuple[float, float]:
    """A run into a new folder, on a disk that is done with its other work.

    Returns:
        its seconds, and how many cores others used meanwhile.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    wait_until_quiet()
    start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
    work(out)
    seconds = time.perf_counter() - start
    others = busy_seconds() - busy - (time.process_time() - own)
    return seconds, max(0.0, others / seconds)


def throughput(folder: Path) -> dict[str, Any]:
    """GB of BF16 per second of every variant: median, best and all runs."""
    source = make_model(folder / "model", SHAPES * 6)
    size = (source / FILE).stat().st_size
    variants: dict[str, Callable[[Path], object]] = {
        "whole-tensor loop": lambda out: whole_tensor_loop(source, out)
    }
    for workers, report in ((1, False), (2, False), (4, False), (2, True)):
        variants[f"{workers} workers, {'report' if report else 'no report'}"] = (
            lambda out, w=workers, r=report: pack_checkpoint(  # type: ignore[misc]
                source, out, OPTIONS, workers=w, report=r
            )
        )
    runs: dict[str, list[float]] = {name: [] for name in variants}
    disturbed: dict[str, list[float]] = {name: [] for name in variants}
    same = True
    for repeat in range(REPEATS):
        for name, work in variants.items():
            seconds, others = timed(work, folder / name)
            runs[name].append(size / seconds / 1e9)
            disturbed[name].append(others)
        if repeat == 0:
            loop, ours = (
                load_file(folder / name / FILE)
                for name in ("whole-tensor loop", "2 workers, no report")
            )
            same = loop.keys() == ours.keys() and all(
                torch.equal(loop[name].view(torch.uint8), ours[name].view(torch.uint8))
                for name in loop
            )
            del loop, ours
    shutil.rmtree(folder)
    rates = {
        name: {
            "median GB/s": round(statistics.median(found), 3),
            "best GB/s": round(max(found), 3),
            "runs": [round(rate, 3) for rate in found],
            "cores that others used": [round(others, 2) for others in disturbed[name]],
        }
        for name, found in runs.items()
    }
    medians = {name: statistics.median(found) for name, found in runs.items()}
    return {
        "source GB": round(size / 1e9, 3),
        "same bytes as the loop": same,
        "rates": rates,
        "times the loop": round(medians["2 workers, no report"] / medians["whole-tensor loop"], 2),
        "2 workers over 1": round(
            medians["2 workers, no report"] / medians["1 workers, no report"], 2
        ),
        "no report": round(medians["2 workers, no report"], 3),
        "report": round(medians["2 workers, report"], 3),
    }


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this kernel does not report RssAnon")


def pack_and_watch(source: Path, out: Path, report: bool) -> None:
    """In a fresh process: print the anonymous memory after importing torch, and its peak."""
    bare = anonymous_bytes()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    pack_checkpoint(source, out, OPTIONS, workers=2, report=report)
    done.set()
    thread.join()
    print(json.dumps([bare, peak[0]]))


def memory(folder: Path) -> dict[str, Any]:
    """Anonymous memory over the bare interpreter with torch, for one tensor of 4 GiB."""
    source = make_model(folder / "large", [LARGE])
    found: dict[str, Any] = {"tensor GB": round((source / FILE).stat().st_size / 1e9, 3)}
    for report in (False, True):
        out = folder / "out"
        code = (
            "import sys, torch; from pathlib import Path; from bench.pack import pack_and_watch; "
            "pack_and_watch(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == 'True')"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code, str(source), str(out), str(report)],
            check=True,
            capture_output=True,
            text=True,
        )
        bare, peak = json.loads(ran.stdout)
        found["with report" if report else "without report"] = {
            "bare MB": round(bare / 1e6, 1),
            "peak over bare MB": round((peak - bare) / 1e6, 1),
        }
        shutil.rmtree(out)
    shutil.rmtree(folder)
    return found


def main(path: str) -> int:
    """Run everything and write what came out."""
    cores = len(os.sched_getaffinity(0))
    load = [round(one, 2) for one in os.getloadavg()]
    with tempfile.TemporaryDirectory(prefix="fp8dispatch-bench-") as folder:
        speed = throughput(Path(folder) / "speed")
        space = memory(Path(folder) / "space")
    highest = max(space[name]["peak over bare MB"] for name in ("with report", "without report"))
    reached = {
        "no report": speed["no report"] >= AIM["no report"],
        "report": speed["report"] >= AIM["report"],
        "times the loop": speed["times the loop"] >= AIM["times the loop"],
        "anonymous MB": highest < AIM["anonymous MB"],
        "same bytes as the loop": speed["same bytes as the loop"],
    }
    result = {
        "cores": cores,
        "load average before": load,
        "load average after": [round(one, 2) for one in os.getloadavg()],
        "recipe": "block128, hf format",
        "aims": AIM,
        "reached": reached,
        "throughput": speed,
        "memory": space,
    }
    for name, rate in speed["rates"].items():
        print(f"{name:24} {rate['median GB/s']:6.2f} GB/s (best {rate['best GB/s']:.2f})")
    print(f"{speed['times the loop']} times the loop; {highest} MB; reached: {reached}")
    environment.write(path, result)
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.pack OUT.json")
    sys.exit(main(sys.argv[1]))
