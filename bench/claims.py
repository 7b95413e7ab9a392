"""The numbers of the README as data: the words around them, and how a result file gives them.

A claim is a text of the README with a place ``{}`` for each number. `Claim.values` computes them
from result files, rounded as the README has them; `bench.figures` puts them into the text and looks
for it in the README. Whoever writes a number into the README adds its claim here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench import claims_gpu
from bench.rounding import WORDS, Read, rounded
from bench.shapes import GRID

GRID_SHAPES = {(weight.n, weight.k) for weight in GRID}


class Claim(NamedTuple):
    """Some words of the README.

    Attributes:
        text: with a place for each value.
        values: computes them; raises AssertionError where a file does not support the words.
    """

    text: str
    values: Callable[[Read], tuple[object, ...]]


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
    yield Claim(
        "`fbgemm` ({}), `deepgemm` ({}) and `torchao` ({}) have run on an H200",
        claims_gpu.libraries,
    )
    yield Claim("One H200 (driver {}, torch {}, triton {})", claims_gpu.machine)
    yield Claim(
        "{} calls over these {} backends, {} recipes, {} output dtypes, with and without bias, M "
        "from {} to {}, ragged N and K, K up to {}, against float64 on the same quantised "
        "operands: the worst row of an output has {} dB in bf16, {} dB in fp16 and {} dB in fp32, "
        "the worst row of dX {} dB; every other call was refused with a sentence",
        claims_gpu.numerics,
    )
    if claims_gpu.suite_is_green(read):
        yield Claim("The GPU suite passes", lambda _: ())
    else:
        yield Claim(
            "Of the {} tests of the GPU suite that ran {} passed at once, and the other {} once "
            "what they had found was mended",
            claims_gpu.suite,
        )
    yield Claim(
        "compute-sanitizer finds nothing in the Triton and the Gluon kernels of linear layers",
        claims_gpu.sanitizer,
    )
    yield Claim("{} random cases on the CPU pass for each of {} seeds", _random_cases)
    yield Claim(
        "every sentence keeps a cosine of at least {} to fp32 in each recipe, with {} the bytes "
        "of bf16",
        claims_gpu.demo,
    )
    yield Claim(
        "a repeated call in blocks keeps Python busy for {} microseconds with `gluon`, {} of them "
        "in the backend's own entry point, {} ({}) with `triton` and {} ({}) with `cublaslt`, "
        "where bf16 takes about {}",
        claims_gpu.host,
    )
    yield Claim(
        "The first call of a process over a 4096 x 7168 layer takes {} s in blocks and {} s per "
        "row with nothing stored (canaries and the compilation of our kernels included), {} and "
        "{} s once verdicts and kernels are stored; importing torch took {} to {} s before that. "
        "Prepared layouts add {} and {} KB to a weight of {} MB",
        claims_gpu.coldstart,
    )
    for row in read("h200-gemm.json")["gemm"]:
        if (row.get("n"), row.get("k")) in GRID_SHAPES:
            yield Claim(
                "| {} x {} x {} | {} | {} | {} | {} | {} |", lambda _, row=row: claims_gpu.gemm(row)
            )
    yield Claim(
        "Over {} such sizes `gluon` is {} times as fast as DeepGEMM ({} without the one that takes "
        "DeepGEMM {} times as long, and {} at the worst) and {} times as fast as cuBLASLt",
        claims_gpu.gemm_means,
    )
    yield Claim(
        "in blocks {} times as fast as the best of FBGEMM 128x128, TorchAO, DeepGEMM and bf16 for "
        "M up to 64 ({} points) and {} times from 256 on ({} points, {} at the worst); per row {} "
        "times as fast as the better of FBGEMM and cuBLASLt, both exact, behind our quantiser "
        "({} points, {} at the worst). At {} of {} points it cost over 5 % and over 2 us more "
        "than the best backend that it could have taken, captured in a graph at {}",
        claims_gpu.linear,
    )
    yield Claim(
        "M up to 16, {} times as fast as the best of the block-scaled peers, and never slower than "
        "{} of what reading the weight takes; M = 32 and 64, {} times as fast as DeepGEMM",
        claims_gpu.decode,
    )
    yield Claim(
        "1x128 groups of 8192 x 8192 take {} us where a copy of as many bytes takes {}; RMSNorm "
        "with quantisation is {} times as fast as the faster of plain and compiled torch in front "
        "of it, SiLU-gating {} times",
        claims_gpu.quantise,
    )
    yield Claim(
        "bf16's time for `dY @ W` over that of dX from the FP8 weight is {} to {} at M = 16, {} to "
        "{} at 256, {} to {} at 1024 and {} to {} at 4096",
        claims_gpu.gradient,
    )
    yield Claim(
        "8192 rows over {} experts of 4096 x 7168 take {} us with `gluon`, {} with `triton`, {} "
        "with DeepGEMM and {} with FBGEMM (quantisation and alignment included), {} with torch's "
        "grouped bf16 matmul; a whole DeepSeek-V3 layer of experts, captured, takes {} ms at 16 "
        "tokens and {} at 4096, in bf16 {} and {}",
        claims_gpu.experts,
    )
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
        WORDS[len(forms)],
        *{row["modules"] for row in ratios},
        rounded(min(row["worst SQNR, dB"] for row in ratios), 1),
        *(rounded(100 * (row["ratio"] - 1), 1) for row in small),
        *{row["tokens"] for row in small},
        rounded(100 * min(errors), 1),
        rounded(100 * max(errors), 1),
    )


def _random_cases(read: Read) -> tuple[object, ...]:
    found = re.findall(r"(\d+) passing, (\d+) failing", read("cpu-hypothesis.txt"))
    assert len({passing for passing, _ in found}) == 1, f"runs differ: {found}"
    assert {failing for _, failing in found} == {"0"}, f"cases fail: {found}"
    return f"{int(found[0][0]):,}", WORDS[len(found)]


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
        WORDS[runs],
        rounded(speed["report"], 2),
        rounded(speed["times the loop"], 1),
        rounded(space["tensor GB"], 1),
        rounded(highest),
    )
