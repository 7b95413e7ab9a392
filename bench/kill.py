"""Kill packing at random moments and resume it: ``python -m bench.kill OUT.json``.

Fifty times a child packs a model of eight files and gets SIGKILL after a random time, up to three
times in a row; then the job is finished. After every kill each file with a final name must be
whole, and at the end the folder must equal that of a job that was not killed, byte by byte.
Exits 1 when it does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.pack import FILE, make_model
from fp8dispatch.pack.options import PackOptions
from fp8dispatch.pack.output import JOURNAL
from fp8dispatch.pack.packing import pack_checkpoint

POINTS, FILES = 50, 8
OPTIONS = PackOptions(recipe="block128")


def make_sharded(folder: Path) -> Path:
    """A model of eight files of 34 MB, with an index."""
    folder.mkdir(parents=True)
    weight_map = {}
    for number in range(FILES):
        part = make_model(folder / "part", [(2048, 4096), (2048, 4096)])
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        # One name for each file: the layers' numbers come from the place in the model.
        raw = (part / FILE).read_bytes()
        for layer in (1, 0):
            new = f"model.layers.{number}{layer}.mlp.up_proj.weight"
            raw = _renamed(raw, f"model.layers.{layer}.mlp.up_proj.weight", new)
            weight_map[new] = file
        (folder / file).write_bytes(raw)
        shutil.rmtree(part)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def _renamed(raw: bytes, old: str, new: str) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps({new if name == old else name: value for name, value in header.items()})
    return len(text).to_bytes(8, "little") + text.encode() + raw[8 + length :]


def digests(folder: Path) -> dict[str, str]:
    """A digest of each file, the journal's aside."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and JOURNAL not in path.parts
    }


def killed(source: Path, out: Path, after: float) -> bool:
    """Pack in a child and kill it; whether the signal came before the end."""
    child = os.fork()
    if child == 0:
        pack_checkpoint(source, out, OPTIONS, workers=2)
        os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(path: str) -> int:
    """Run all points and write what came out."""
    torch.set_num_threads(1)  # no threads of torch's own that a fork would lose
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fp8dispatch-bench-") as name:
        folder = Path(name)
        source = make_sharded(folder / "source")
        pack_checkpoint(source, folder / "whole", OPTIONS, workers=2)
        start = time.perf_counter()
        pack_checkpoint(source, folder / "again", OPTIONS, workers=2)
        duration = time.perf_counter() - start
        expected = digests(folder / "whole")
        for seed in range(POINTS):
            generator, out = random.Random(seed), folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            kills, partial = 0, 0
            for _ in range(3):
                if not killed(source, out, generator.uniform(0, duration)):
                    break
                kills += 1
                left = digests(out) if out.exists() else {}
                partial += sum(expected.get(file) != digest for file, digest in left.items())
            # A job takes its manifest away when its last file, the configuration, is there.
            unfinished = (
                not (out / "config.json").exists() or (out / JOURNAL / "manifest.json").exists()
            )
            if unfinished:
                pack_checkpoint(source, out, OPTIONS, workers=2)
            rows.append(
                {
                    "seed": seed,
                    "kills": kills,
                    "finished before the last kill": not unfinished,
                    "partial files under a final name": partial,
                    "identical": digests(out) == expected,
                }
            )
    good = all(row["identical"] and not row["partial files under a final name"] for row in rows)
    result = {
        "points": POINTS,
        "kills": sum(row["kills"] for row in rows),
        "files of the result": sorted(expected),
        "seconds without a kill": round(duration, 2),
        "all identical, no partial file": good,
        "rows": rows,
    }
    print(f"{result['kills']} kills at {POINTS} points, all identical: {good}")
    environment.write(path, result)
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.kill OUT.json")
    sys.exit(main(sys.argv[1]))
